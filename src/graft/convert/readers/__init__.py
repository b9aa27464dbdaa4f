"""Readers of other tools' files, one for each."""
