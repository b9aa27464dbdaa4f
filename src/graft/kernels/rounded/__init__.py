"""Products whose inputs are rounded to 8 bits."""
