"""Export to a plain Hugging Face folder, which Transformers and most programs read."""
