"""Operators, their schemas and the backends that compute them; imports torch and graft.errors."""
