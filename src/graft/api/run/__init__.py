"""A training run: what is prepared, its base, its folder, its report and its card."""
