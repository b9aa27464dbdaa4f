"""One token through a whole decoder."""
