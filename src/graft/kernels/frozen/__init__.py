"""Products with a frozen weight of any kind, and its rounding."""
