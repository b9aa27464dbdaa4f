"""The Triton backend's statistics that move: one kernel where plain PyTorch takes a dozen."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.kernels.backend.triton_launch import STATISTICS, as_stored, launch, tiles, triton
from graft.kernels.moves import reference


@triton.implements("move_offsets")
def move_offsets(
    offsets: Tensor, A: Tensor, B: Tensor, scaling: float, stored: torch.dtype
) -> Tensor:
    """Compute stored(offsets + scaling B A) in float64, as float32 [out_features, groups]."""
    if stored not in STATISTICS or A.dtype != torch.float32:
        return reference.move_offsets(offsets, A, B, scaling, stored)
    (rank, groups), out_features = A.shape, B.shape[0]
    out = offsets.new_empty((out_features, groups), dtype=torch.float32)
    arguments = *as_stored(offsets, A, B), out_features, groups, rank
    constants = {"SCALING": scaling, "HALF": stored == torch.float16, "ROWS": 16, "GROUPS": 32}
    grid = tiles(out_features, 16), tiles(groups, 32)
    launch("move_offsets", grid, out, *arguments, **constants)
    return out


@triton.implements("move_by_factors")
def move_by_factors(
    scales: Tensor, offsets: Tensor, A: Tensor, B: Tensor, scaling: float, u_A: Tensor, u_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the scales moved by u_B u_A and the offsets moved by scaling B A in one launch."""
    stored, factors = {scales.dtype, offsets.dtype}, (A, B, u_A, u_B)
    if not stored <= set(STATISTICS) or any(factor.dtype != torch.float32 for factor in factors):
        return reference.move_by_factors(scales, offsets, A, B, scaling, u_A, u_B)
    out_features, groups = scales.shape
    moved_scales = scales.new_empty(scales.shape)
    moved_offsets = offsets.new_empty(offsets.shape, dtype=torch.float32)
    sizes = out_features, groups, A.shape[0], u_A.shape[0]
    half = offsets.dtype == torch.float16
    constants = {"SCALING": scaling, "HALF": half, "ROWS": 16, "GROUPS": 32}
    arguments = moved_offsets, *as_stored(scales, offsets, *factors), *sizes
    grid = tiles(out_features, 16), tiles(groups, 32)
    launch("move_by_factors", grid, moved_scales, *arguments, **constants)
    return moved_scales, moved_offsets


@triton.implements("move_scaled")
def move_scaled(values: Tensor, scales: Tensor, moves: Tensor, stored: torch.dtype) -> Tensor:
    """Compute values + scales * moves in float64, rounded once to the stored dtype."""
    if stored not in STATISTICS:
        return reference.move_scaled(values, scales, moves, stored)
    out = values.new_empty(values.shape, dtype=stored)
    arguments = *as_stored(values, scales, moves), out.numel()
    launch("move_scaled", (tiles(out.numel(), 1024),), out, *arguments, SIZE=1024)
    return out
