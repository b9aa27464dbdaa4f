"""A folder for mlx-lm."""
