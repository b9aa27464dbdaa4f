"""The modules whose weights are frozen: what they hold, and what stands in their place."""
