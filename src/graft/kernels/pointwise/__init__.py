"""What lies between a decoder's products: norms and gates."""
