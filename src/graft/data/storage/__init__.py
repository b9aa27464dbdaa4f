"""Encoded rows that do not fit into memory: made by several processes, mapped, and kept."""
