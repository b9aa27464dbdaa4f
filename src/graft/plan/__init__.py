"""Memory planned from config.json alone; imports graft.model and below, not graft.data."""
