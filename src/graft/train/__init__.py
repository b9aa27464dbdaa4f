"""The training loop, its checkpoints and metrics; imports graft.data and below, no sibling."""
