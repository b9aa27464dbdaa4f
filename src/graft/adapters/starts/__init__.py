"""How an adapter begins, and what that asks of its base."""
