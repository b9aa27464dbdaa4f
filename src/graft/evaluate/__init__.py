"""Loss, generation and fidelity, all read-only; imports graft.data and below, no sibling."""
