"""Importing this module registers every backend."""

from graft.kernels import (
    native_low_rank,
    reference,
    triton_backend,
    triton_low_rank,
    triton_moves,
)

__all__ = ["native_low_rank", "reference", "triton_backend", "triton_low_rank", "triton_moves"]
