"""The Triton kernels of int group weights, w = scale * q + offset.

The packed layout is read as it lies on disk (`graft.kernels.packed`). An index beyond the packed
weight is clamped, and what it reads is multiplied with an x of zero or never written: so these
reads need no masks, which would break the wide loads up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graft.kernels.backend.triton_products import add_product, store_tokens
from graft.kernels.backend.triton_rounding import rounded

# A tile is [rows, blocks, bytes]; one byte of the first plane holds 8 / PLANE codes, its parts, and
# part p of byte j is the code of column p * BYTES + j of the block of 32, BYTES = 4 * PLANE.


@triton.jit
def int_group_codes(
    packed, high_ptr, row, block, byte, part, blocks, BITS: tl.constexpr, PLANE: tl.constexpr
):
    """Return one part's codes of a tile of bytes, as float32."""
    codes = (packed >> (part * PLANE)) & ((1 << PLANE) - 1)
    if BITS == 3:
        high = tl.load(high_ptr + (row * blocks + block) * 4 + part).to(tl.int32)
        codes = codes | (((high >> byte) & 1) << 2)
    return codes.to(tl.float32)


@triton.jit
def int_group_statistics(scales_ptr, offsets_ptr, row, block, first, groups, GROUP: tl.constexpr):
    """Return float32 scales and offsets; `first` is the column within the block of 32."""
    # A group of 32 and more holds whole blocks: one statistic for each, and not for each byte.
    group = (block * 32 + first) // GROUP if GROUP < 32 else block * 32 // GROUP
    index = row * groups + tl.minimum(group, groups - 1)
    return tl.load(scales_ptr + index).to(tl.float32), tl.load(offsets_ptr + index).to(tl.float32)


@triton.jit
def int_group_dequantize(
    out_ptr,
    codes_ptr,
    high_ptr,
    scales_ptr,
    offsets_ptr,
    out_features,
    in_features,
    groups,
    blocks,
    BITS: tl.constexpr,
    PLANE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Write w = scale * q + offset for a tile of ROWS rows and BLOCKS blocks of 32 columns."""
    BYTES: tl.constexpr = 4 * PLANE
    out_row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
    out_block = (tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS))[None, :, None]
    row = tl.minimum(out_row, out_features - 1)
    block = tl.minimum(out_block, blocks - 1)
    byte = tl.arange(0, BYTES)[None, None, :]
    packed = tl.load(codes_ptr + (row * blocks + block) * BYTES + byte).to(tl.int32)
    for part in tl.static_range(8 // PLANE):
        first = part * BYTES + byte
        scales, offsets = int_group_statistics(
            scales_ptr, offsets_ptr, row, block, first, groups, GROUP
        )
        codes = int_group_codes(packed, high_ptr, row, block, byte, part, blocks, BITS, PLANE)
        column = out_block * 32 + first
        mask = (out_row < out_features) & (column < in_features)
        weight = rounded(codes * scales + offsets, out_ptr.dtype.element_ty)
        tl.store(out_ptr + out_row * in_features + column, weight, mask=mask)


@triton.jit
def int_group_linear(
    out_ptr,
    x_ptr,
    codes_ptr,
    high_ptr,
    scales_ptr,
    offsets_ptr,
    tokens,
    out_features,
    in_features,
    groups,
    blocks,
    steps,
    BITS: tl.constexpr,
    PLANE: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Write y = x Wᵀ over this split's `steps` tiles of BLOCKS blocks of 32 columns."""
    BYTES: tl.constexpr = 4 * PLANE
    token = tl.arange(0, TOKENS)
    out_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(out_row, out_features - 1).to(tl.int64)[:, None, None]
    byte = tl.arange(0, BYTES)[None, None, :]
    # Columns are taken in the order in which the codes lie: part by part, not one after another.
    flat = tl.arange(0, BLOCKS * BYTES)
    column = flat // BYTES * 32 + flat % BYTES
    acc = tl.zeros((TOKENS, ROWS), tl.float32)
    for step in range(tl.program_id(1) * steps, tl.program_id(1) * steps + steps):
        block = tl.minimum(step * BLOCKS + tl.arange(0, BLOCKS), blocks - 1)[None, :, None]
        packed = tl.load(codes_ptr + (row * blocks + block) * BYTES + byte).to(tl.int32)
        for part in tl.static_range(8 // PLANE):
            first = part * BYTES + byte
            scales, offsets = int_group_statistics(
                scales_ptr, offsets_ptr, row, block, first, groups, GROUP
            )
            codes = int_group_codes(packed, high_ptr, row, block, byte, part, blocks, BITS, PLANE)
            weight = tl.reshape(codes * scales + offsets, (ROWS, BLOCKS * BYTES))
            weight = rounded(weight, x_ptr.dtype.element_ty)
            here = step * (BLOCKS * 32) + part * BYTES + column
            mask = (token < tokens)[:, None] & (here < in_features)[None, :]
            x = tl.load(x_ptr + token[:, None] * in_features + here[None, :], mask=mask, other=0.0)
            acc = add_product(acc, x, tl.trans(weight))
    store_tokens(out_ptr, acc, token, out_row, tokens, out_features)


@triton.jit
def int_group_grad_statistics(
    scales_ptr,
    offsets_ptr,
    grad_ptr,
    x_ptr,
    codes_ptr,
    high_ptr,
    units_ptr,
    tokens,
    out_features,
    in_features,
    groups,
    blocks,
    BITS: tl.constexpr,
    PLANE: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the group sums of (dyᵀ x) * q and of dyᵀ x, times units, for a tile of the product."""
    BYTES: tl.constexpr = 4 * PLANE
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, tokens, TOKENS):
        token = (start + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
        grad_mask = (token < tokens) & (row < out_features)[None, :]
        x_mask = (token < tokens) & (column < in_features)[None, :]
        grad = tl.load(grad_ptr + token * out_features + row[None, :], mask=grad_mask, other=0.0)
        x = tl.load(x_ptr + token * in_features + column[None, :], mask=x_mask, other=0.0)
        acc = add_product(acc, tl.trans(grad), x)
    # The codes are fetched one by one here: once a tile, beside a product over all tokens.
    safe_row = tl.minimum(row, out_features - 1).to(tl.int64)[:, None]
    block = tl.minimum(column // 32, blocks - 1)[None, :]
    byte = (column % BYTES)[None, :]
    part = (column % 32 // BYTES)[None, :]
    packed = tl.load(codes_ptr + (safe_row * blocks + block) * BYTES + byte).to(tl.int32)
    codes = int_group_codes(packed, high_ptr, safe_row, block, byte, part, blocks, BITS, PLANE)
    scales = tl.sum(tl.reshape(acc * codes, (ROWS, COLUMNS // GROUP, GROUP)), axis=2)
    offsets = tl.sum(tl.reshape(acc, (ROWS, COLUMNS // GROUP, GROUP)), axis=2)
    group = tl.program_id(1) * (COLUMNS // GROUP) + tl.arange(0, COLUMNS // GROUP)
    mask = (row < out_features)[:, None] & (group < groups)[None, :]
    index = row[:, None] * groups + group[None, :]
    if units_ptr is not None:
        units = tl.load(units_ptr + index, mask=mask, other=0.0).to(tl.float32)
        scales *= units
        offsets *= units
    tl.store(scales_ptr + index, scales, mask=mask)
    tl.store(offsets_ptr + index, offsets, mask=mask)


@triton.jit
def int_group_vector(
    out_ptr,
    x_ptr,
    codes_ptr,
    high_ptr,
    scales_ptr,
    offsets_ptr,
    out_features,
    in_features,
    groups,
    blocks,
    BITS: tl.constexpr,
    PLANE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Write y = x Wᵀ of one token for ROWS rows, BLOCKS blocks of 32 columns at a time."""
    BYTES: tl.constexpr = 4 * PLANE
    out_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(out_row, out_features - 1).to(tl.int64)[:, None, None]
    byte = tl.arange(0, BYTES)[None, None, :]
    acc = tl.zeros((ROWS, BLOCKS, BYTES), tl.float32)
    for start in range(0, blocks, BLOCKS):
        here = start + tl.arange(0, BLOCKS)[None, :, None]
        block = tl.minimum(here, blocks - 1)
        packed = tl.load(codes_ptr + (row * blocks + block) * BYTES + byte).to(tl.int32)
        for part in tl.static_range(8 // PLANE):
            first = part * BYTES + byte
            scales, offsets = int_group_statistics(
                scales_ptr, offsets_ptr, row, block, first, groups, GROUP
            )
            codes = int_group_codes(packed, high_ptr, row, block, byte, part, blocks, BITS, PLANE)
            weight = rounded(codes * scales + offsets, x_ptr.dtype.element_ty).to(tl.float32)
            column = here * 32 + first
            x = tl.load(x_ptr + column, mask=column < in_features, other=0.0).to(tl.float32)
            acc += weight * x
    y = rounded(tl.sum(tl.sum(acc, 2), 1), out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_row, y, mask=out_row < out_features)
