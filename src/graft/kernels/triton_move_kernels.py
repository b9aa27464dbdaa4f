"""The Triton kernels of statistics that move: in float64, rounded once."""

from __future__ import annotations

import triton
import triton.language as tl


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
    of_row, of_group = row < out_features, group < groups
    update = tl.zeros((ROWS, GROUPS), tl.float64)
    for index in range(rank):
        b = tl.load(b_ptr + row * rank + index, mask=of_row, other=0.0).to(tl.float64)
        a = tl.load(a_ptr + index * groups + group, mask=of_group, other=0.0).to(tl.float64)
        update += b[:, None] * a[None, :]
    index = row[:, None] * groups + group[None, :]
    mask = of_row[:, None] & of_group[None, :]
    moved = tl.load(offsets_ptr + index, mask=mask, other=0.0).to(tl.float64) + update * SCALING
    if HALF:
        moved = moved.to(tl.float16)
    tl.store(out_ptr + index, moved.to(tl.float32), mask=mask)


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
