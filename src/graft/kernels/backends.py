"""Importing this module registers every backend."""

from graft.kernels import native_low_rank, reference, triton_backend, triton_moves

__all__ = ["native_low_rank", "reference", "triton_backend", "triton_moves"]
