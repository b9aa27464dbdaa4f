"""Conversations: what messages say, how a template takes them, where in a text answers stand."""
