"""The Triton kernels of the latent weight W + SCALING B A, which rounds to codes on its grid.

Every product and every sum is rounded to float32 on its own, the terms of B A in their order, as
the reference rounds them: so all backends round the same numbers to the same codes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def latent_codes_of(
    weight_ptr,
    scales_ptr,
    offsets_ptr,
    a_ptr,
    b_ptr,
    row,
    column,
    in_features,
    groups,
    rank,
    UPDATE: tl.constexpr,
    SCALING: tl.constexpr,
    LARGEST: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Return round((W + SCALING B A - offset) / scale), -1 or LARGEST + 1 where off the grid."""
    there = column < in_features
    value = tl.load(weight_ptr + row * in_features + column, mask=there, other=0.0).to(tl.float32)
    if UPDATE:
        update = tl.zeros_like(value)
        for index in range(rank):
            a = tl.load(a_ptr + index * in_features + column, mask=there, other=0.0)
            update += tl.load(b_ptr + row * rank + index) * a
        value += SCALING * update
    statistic = row * groups + tl.minimum(column // GROUP, groups - 1)
    scale = tl.load(scales_ptr + statistic).to(tl.float32)
    step = tl.div_rn(value - tl.load(offsets_ptr + statistic).to(tl.float32), scale)
    step = tl.minimum(tl.maximum(step, -1.0), LARGEST + 1.0)
    # Beside 1.5 * 2^23 a float32 holds whole numbers only, rounded to nearest even.
    return (step + 12582912.0) - 12582912.0


@triton.jit
def latent_codes(
    codes_ptr,
    high_ptr,
    weight_ptr,
    scales_ptr,
    offsets_ptr,
    a_ptr,
    b_ptr,
    out_features,
    in_features,
    groups,
    blocks,
    rank,
    BITS: tl.constexpr,
    PLANE: tl.constexpr,
    GROUP: tl.constexpr,
    UPDATE: tl.constexpr,
    SCALING: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Write the packed codes of a tile, as `graft.kernels.packed.planes` lays them out."""
    BYTES: tl.constexpr = 4 * PLANE
    LARGEST: tl.constexpr = (1 << BITS) - 1
    out_row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
    block = (tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS))[None, :, None]
    byte = tl.arange(0, BYTES)[None, None, :]
    row = tl.minimum(out_row, out_features - 1)
    mask = (out_row < out_features) & (block < blocks)
    place = out_row * blocks + block
    packed = tl.zeros((ROWS, BLOCKS, BYTES), tl.int32)
    for part in tl.static_range(8 // PLANE):
        column = block * 32 + part * BYTES + byte
        code = latent_codes_of(
            weight_ptr,
            scales_ptr,
            offsets_ptr,
            a_ptr,
            b_ptr,
            row,
            column,
            in_features,
            groups,
            rank,
            UPDATE,
            SCALING,
            LARGEST,
            GROUP,
        )
        code = tl.minimum(tl.maximum(code, 0.0), LARGEST * 1.0).to(tl.int32)
        code = tl.where(column < in_features, code, 0)
        packed |= (code & ((1 << PLANE) - 1)) << (part * PLANE)
        if BITS == 3:
            high = tl.sum((code >> 2) << byte, 2, keep_dims=True)
            tl.store(high_ptr + place * 4 + part, high.to(tl.uint8), mask=mask)
    tl.store(codes_ptr + place * BYTES + byte, packed.to(tl.uint8), mask=mask)


@triton.jit
def latent_grads(
    grad_ptr,
    grad_u_ptr,
    grad_v_ptr,
    product_ptr,
    weight_ptr,
    scales_ptr,
    offsets_ptr,
    a_ptr,
    b_ptr,
    out_features,
    in_features,
    groups,
    rank,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    UPDATE: tl.constexpr,
    SCALING: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write dW, du and dv of a tile, which holds whole groups."""
    LARGEST: tl.constexpr = (1 << BITS) - 1
    GROUPS: tl.constexpr = COLUMNS // GROUP
    out_row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    row = tl.minimum(out_row, out_features - 1)
    code = latent_codes_of(
        weight_ptr,
        scales_ptr,
        offsets_ptr,
        a_ptr,
        b_ptr,
        row,
        column,
        in_features,
        groups,
        rank,
        UPDATE,
        SCALING,
        LARGEST,
        GROUP,
    )
    mask = (out_row < out_features) & (column < in_features)
    index = out_row * in_features + column
    product = tl.load(product_ptr + index, mask=mask, other=0.0)
    inside = (code >= 0.0) & (code <= LARGEST)
    tl.store(grad_ptr + index, tl.where(inside, product, 0.0), mask=mask)
    code = tl.minimum(tl.maximum(code, 0.0), LARGEST * 1.0)
    group = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS))[None, :]
    mask = (out_row < out_features) & (group < groups)
    index = out_row * groups + group
    scale = tl.load(scales_ptr + index, mask=mask, other=0.0).to(tl.float32)
    grad_u = tl.sum(tl.reshape(product * code, (ROWS, GROUPS, GROUP)), 2) * scale
    grad_v = tl.sum(tl.reshape(product, (ROWS, GROUPS, GROUP)), 2) * scale
    tl.store(grad_u_ptr + index, grad_u, mask=mask)
    tl.store(grad_v_ptr + index, grad_v, mask=mask)
