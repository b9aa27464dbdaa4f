"""Data: files of examples in, token ids with an exact mask of what is trained out."""
