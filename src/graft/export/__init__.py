"""GGUF, merged folders and PEFT adapters; imports graft.data and below, no sibling."""
