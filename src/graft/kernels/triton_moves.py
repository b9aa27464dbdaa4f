"""The Triton backend's statistics that move: one kernel where plain PyTorch takes a dozen."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.kernels import reference
from graft.kernels.triton_launch import as_stored, launch, tiles, triton

_STATISTICS = (torch.float16, torch.float32)
"""What scales and offsets are stored in."""


@triton.implements("move_offsets")
def move_offsets(
    offsets: Tensor, A: Tensor, B: Tensor, scaling: float, stored: torch.dtype
) -> Tensor:
    """Compute stored(offsets + scaling B A) in float64, as float32 [out_features, groups]."""
    if stored not in _STATISTICS or A.dtype != torch.float32:
        return reference.move_offsets(offsets, A, B, scaling, stored)
    (rank, groups), out_features = A.shape, B.shape[0]
    out = offsets.new_empty((out_features, groups), dtype=torch.float32)
    arguments = *as_stored(offsets, A, B), out_features, groups, rank
    constants = {"SCALING": scaling, "HALF": stored == torch.float16, "ROWS": 16, "GROUPS": 32}
    grid = tiles(out_features, 16), tiles(groups, 32)
    launch("move_offsets", grid, out, *arguments, **constants)
    return out


@triton.implements("move_scaled")
def move_scaled(values: Tensor, scales: Tensor, moves: Tensor, stored: torch.dtype) -> Tensor:
    """Compute values + scales * moves in float64, rounded once to the stored dtype."""
    if stored not in _STATISTICS:
        return reference.move_scaled(values, scales, moves, stored)
    out = values.new_empty(values.shape, dtype=stored)
    arguments = *as_stored(values, scales, moves), out.numel()
    launch("move_scaled", (tiles(out.numel(), 1024),), out, *arguments, SIZE=1024)
    return out
