"""Packed weights as the kernels see them: codes in planes, codebooks, layouts."""
