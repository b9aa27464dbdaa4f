"""What a training minimises: how rows become batches, and a batch a loss."""
