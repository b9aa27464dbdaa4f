"""How a model computes here: attention, norms, loss, checkpointing, decoding, memory."""
