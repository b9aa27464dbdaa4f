"""Importing this module registers every backend."""

from graft.kernels.frozen import reference
from graft.kernels.frozen import triton as triton_backend
from graft.kernels.low_rank import native as native_low_rank
from graft.kernels.low_rank import triton as triton_low_rank
from graft.kernels.moves import triton as triton_moves

__all__ = ["native_low_rank", "reference", "triton_backend", "triton_low_rank", "triton_moves"]
