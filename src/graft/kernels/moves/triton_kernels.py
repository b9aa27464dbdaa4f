"""The Triton kernels of statistics that move: in float64, rounded once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def low_rank_sum(
    a_ptr, b_ptr, row, group, out_features, groups, rank, ROWS: tl.constexpr, GROUPS: tl.constexpr
):
    """Return a tile [ROWS, GROUPS] of B A, summed in float64 in the order of the rank."""
    total = tl.zeros((ROWS, GROUPS), tl.float64)
    for index in range(rank):
        b = tl.load(b_ptr + row * rank + index, mask=row < out_features, other=0.0)
        a = tl.load(a_ptr + index * groups + group, mask=group < groups, other=0.0)
        total += b.to(tl.float64)[:, None] * a.to(tl.float64)[None, :]
    return total


@triton.jit
def move_offsets(
    out_ptr,
    offsets_ptr,
    a_ptr,
    b_ptr,
    out_features,
    groups,
    rank,
    SCALING: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Write offsets + SCALING B A, rounded once to float16 if HALF, as float32, for a tile."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    update = low_rank_sum(a_ptr, b_ptr, row, group, out_features, groups, rank, ROWS, GROUPS)
    index = row[:, None] * groups + group[None, :]
    mask = (row < out_features)[:, None] & (group < groups)[None, :]
    moved = tl.load(offsets_ptr + index, mask=mask, other=0.0).to(tl.float64) + update * SCALING
    if HALF:
        moved = moved.to(tl.float16)
    tl.store(out_ptr + index, moved.to(tl.float32), mask=mask)


@triton.jit
def move_by_factors(
    moved_scales_ptr,
    moved_offsets_ptr,
    scales_ptr,
    offsets_ptr,
    a_ptr,
    b_ptr,
    u_a_ptr,
    u_b_ptr,
    out_features,
    groups,
    rank,
    grid_rank,
    SCALING: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Write scales + scales u, u = float32(u_B u_A), and what `move_offsets` writes, for a tile."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    index = row[:, None] * groups + group[None, :]
    mask = (row < out_features)[:, None] & (group < groups)[None, :]
    u = low_rank_sum(u_a_ptr, u_b_ptr, row, group, out_features, groups, grid_rank, ROWS, GROUPS)
    u = u.to(tl.float32).to(tl.float64)
    scales = tl.load(scales_ptr + index, mask=mask, other=0.0).to(tl.float64)
    scales = (scales + scales * u).to(moved_scales_ptr.dtype.element_ty)
    tl.store(moved_scales_ptr + index, scales, mask=mask)
    move_offsets(
        moved_offsets_ptr,
        offsets_ptr,
        a_ptr,
        b_ptr,
        out_features,
        groups,
        rank,
        SCALING,
        HALF,
        ROWS,
        GROUPS,
    )


@triton.jit
def move_scaled(out_ptr, values_ptr, scales_ptr, moves_ptr, count, SIZE: tl.constexpr):
    """Write values + scales * moves for SIZE numbers, rounded once to the output's dtype."""
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = index < count
    values = tl.load(values_ptr + index, mask=mask, other=0.0).to(tl.float64)
    scales = tl.load(scales_ptr + index, mask=mask, other=0.0).to(tl.float64)
    moves = tl.load(moves_ptr + index, mask=mask, other=0.0).to(tl.float64)
    moved = values + scales * moves
    tl.store(out_ptr + index, moved.to(out_ptr.dtype.element_ty), mask=mask)
