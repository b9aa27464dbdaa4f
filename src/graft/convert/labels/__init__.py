"""What settings say of the weights, and whether that is so."""
