"""Flags, YAML, tables and progress in the terminal; imports all of graft, and alone rich."""
