"""Export of an adapter by itself, as PEFT reads it."""
