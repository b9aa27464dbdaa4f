"""Files: written whole and for good or not at all, read within bounds, held by one process."""
