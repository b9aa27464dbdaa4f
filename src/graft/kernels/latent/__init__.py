"""A latent weight that is rounded anew for each update."""
