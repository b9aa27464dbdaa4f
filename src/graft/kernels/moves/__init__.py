"""Scales and offsets that move: affine tuning and QA-LoRA."""
