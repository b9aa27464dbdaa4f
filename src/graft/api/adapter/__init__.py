"""Work on adapters by themselves: extract, merge, list, show, compare, resize."""
