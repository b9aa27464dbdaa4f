"""GGUF files: reading them, and the layout that the export shares."""
