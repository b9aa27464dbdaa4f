"""The optimizers that training steps with; they know torch alone."""
