"""A frozen weight and its low-rank update in one operation."""
