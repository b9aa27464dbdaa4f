"""Models of other tools into graft's own folder; imports graft.model and below, no sibling."""
