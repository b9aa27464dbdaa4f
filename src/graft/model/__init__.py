"""Transformers models with packed weights and adapters; imports graft.adapters and below."""
