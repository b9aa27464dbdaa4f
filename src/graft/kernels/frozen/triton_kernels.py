"""The Triton kernels of products; `graft.kernels.backend.triton_launch` imports them on first use.

Every kernel reads the packed layout as it lies on disk (`graft.kernels.packed.planes`). An index
beyond the packed weight is clamped, and what it reads is multiplied with an x of zero or never
written: so these reads need no masks, which would break the wide loads up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graft.kernels.backend.triton_rounding import INTERPRETED, rounded
from graft.kernels.latent.triton_kernels import latent_codes, latent_grads
from graft.kernels.moves.triton_kernels import move_by_factors, move_offsets, move_scaled
from graft.kernels.pointwise.triton_kernels import (
    rms_norm,
    rms_norm_backward,
    silu_gate,
    silu_gate_backward,
)

__all__ = ["latent_codes", "latent_grads", "move_by_factors", "move_offsets", "move_scaled"]
__all__ += ["rms_norm", "rms_norm_backward", "silu_gate", "silu_gate_backward"]


@triton.jit
def add_product(acc, a, b):
    """Return acc + a b, float32 [m, n], for a [m, k] and b [k, n] of one dtype."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def store_tokens(out_ptr, acc, token, row, tokens, out_features):
    """Store float32 [tokens, rows] as this split's part of out [splits, tokens, out_features]."""
    index = (tl.program_id(1) * tokens + token[:, None]) * out_features + row[None, :]
    mask = (token < tokens)[:, None] & (row < out_features)[None, :]
    tl.store(out_ptr + index, rounded(acc, out_ptr.dtype.element_ty), mask=mask)


# int group: w = scale * q + offset ---------------------------------------------------------------
#
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
def int_group_grad_scales(
    out_ptr,
    grad_ptr,
    x_ptr,
    codes_ptr,
    high_ptr,
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
    """Write the group sums of (dyᵀ x) * q for a tile of ROWS rows and COLUMNS columns."""
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
    sums = tl.sum(tl.reshape(acc * codes, (ROWS, COLUMNS // GROUP, GROUP)), axis=2)
    group = tl.program_id(1) * (COLUMNS // GROUP) + tl.arange(0, COLUMNS // GROUP)
    mask = (row < out_features)[:, None] & (group < groups)[None, :]
    tl.store(out_ptr + row[:, None] * groups + group[None, :], sums, mask=mask)


# codebook: w = codebook[code] * absmax -----------------------------------------------------------


@triton.jit
def codebook_values(packed, table):
    """Look up both codes of each byte, the high nibble first; flat, twice as long."""
    packed = tl.ravel(packed.to(tl.int32))
    return tl.gather(table, tl.interleave(packed >> 4, packed & 15), axis=0)


@triton.jit
def codebook_absmax(absmax_ptr, dynamic_ptr, scale_ptr, offset_ptr, block, NESTED: tl.constexpr):
    """Load the absmax of blocks; with double quantisation from its 8-bit codes."""
    absmax = tl.load(absmax_ptr + block)
    if scale_ptr is not None:
        value = tl.load(dynamic_ptr + absmax.to(tl.int32))
        absmax = value * tl.load(scale_ptr + block // NESTED) + tl.load(offset_ptr)
    return absmax


@triton.jit
def codebook_quantize(
    codes_ptr,
    absmax_ptr,
    weight_ptr,
    bounds_ptr,
    code_of_rank_ptr,
    count,
    code_bytes,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Quantise BLOCKS blocks of the flattened weight, in the reference's order of operations."""
    block = (tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)).to(tl.int64)[:, None]
    index = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    values = tl.load(weight_ptr + index, mask=index < count, other=0.0).to(tl.float32)
    absmax = tl.max(tl.abs(values), axis=1, keep_dims=True)
    # The maximum passes over NaN; a block that holds one must not look sound.
    has_nan = tl.max((values != values).to(tl.int32), axis=1, keep_dims=True) > 0
    absmax = tl.where(has_nan, float("nan"), absmax)
    # As a tensor: Triton 3.6 takes so small a number for a float64.
    least = tl.full(absmax.shape, 1e-38, tl.float32)
    divisor = tl.maximum(absmax, least, propagate_nan=tl.PropagateNan.ALL)
    short = (block + 1) * BLOCK > count
    normalised = values * tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)
    if (tl.program_id(0) + 1).to(tl.int64) * (BLOCKS * BLOCK) > count:
        divided = tl.div_rn(values, tl.broadcast_to(divisor, values.shape))
        normalised = tl.where(short, divided, normalised)
    rank = tl.zeros(normalised.shape, tl.int32)
    for bound in tl.static_range(15):
        # NaN is above every bound, as for torch.bucketize.
        rank += tl.where(normalised <= tl.load(bounds_ptr + bound), 0, 1)
    code_of_rank = tl.load(code_of_rank_ptr + tl.arange(0, 16)).to(tl.int32)
    codes = tl.gather(code_of_rank, tl.ravel(rank), axis=0)
    high, low = tl.split(tl.reshape(codes, (BLOCKS, BLOCK // 2, 2)))
    byte = block * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(codes_ptr + byte, ((high << 4) | low).to(tl.uint8), mask=byte < code_bytes)
    stored = tl.where(short, divisor, absmax)
    tl.store(absmax_ptr + block, stored, mask=block * BLOCK < count)


@triton.jit
def codebook_dequantize(
    out_ptr,
    codes_ptr,
    absmax_ptr,
    dynamic_ptr,
    scale_ptr,
    offset_ptr,
    table_ptr,
    count,
    code_bytes,
    blocks,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Write codebook[code] * absmax for BLOCKS blocks of the flattened weight."""
    block = (tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)).to(tl.int64)[:, None]
    byte = block * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    index = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    packed = tl.load(codes_ptr + byte, mask=byte < code_bytes, other=0)
    table = tl.load(table_ptr + tl.arange(0, 16))
    block = tl.minimum(block, blocks - 1)
    absmax = codebook_absmax(absmax_ptr, dynamic_ptr, scale_ptr, offset_ptr, block, NESTED)
    weight = tl.reshape(codebook_values(packed, table), (BLOCKS, BLOCK)) * absmax
    tl.store(out_ptr + index, rounded(weight, out_ptr.dtype.element_ty), mask=index < count)


@triton.jit
def codebook_linear(
    out_ptr,
    x_ptr,
    codes_ptr,
    absmax_ptr,
    dynamic_ptr,
    scale_ptr,
    offset_ptr,
    table_ptr,
    tokens,
    out_features,
    in_features,
    steps,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Write y = x Wᵀ over this split's `steps` tiles of BLOCKS blocks; rows hold whole blocks."""
    BYTES: tl.constexpr = BLOCK // 2
    blocks = in_features // BLOCK
    token = tl.arange(0, TOKENS)
    out_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(out_row, out_features - 1).to(tl.int64)[:, None, None]
    byte = tl.arange(0, BYTES)[None, None, :]
    column = tl.arange(0, BLOCKS * BLOCK)
    table = tl.load(table_ptr + tl.arange(0, 16))
    acc = tl.zeros((TOKENS, ROWS), tl.float32)
    for step in range(tl.program_id(1) * steps, tl.program_id(1) * steps + steps):
        block = tl.minimum(step * BLOCKS + tl.arange(0, BLOCKS), blocks - 1)[None, :, None]
        index = row * blocks + block
        packed = tl.load(codes_ptr + index * BYTES + byte)
        weight = tl.reshape(codebook_values(packed, table), (ROWS, BLOCKS, BLOCK))
        absmax = codebook_absmax(absmax_ptr, dynamic_ptr, scale_ptr, offset_ptr, index, NESTED)
        weight = tl.reshape(weight * absmax, (ROWS, BLOCKS * BLOCK))
        here = step * (BLOCKS * BLOCK) + column
        mask = (token < tokens)[:, None] & (here < in_features)[None, :]
        x = tl.load(x_ptr + token[:, None] * in_features + here[None, :], mask=mask, other=0.0)
        acc = add_product(acc, x, tl.trans(rounded(weight, x_ptr.dtype.element_ty)))
    store_tokens(out_ptr, acc, token, out_row, tokens, out_features)


# int8: w = scale[row] * code ---------------------------------------------------------------------


@triton.jit
def int8_dequantize(
    out_ptr,
    codes_ptr,
    scales_ptr,
    out_features,
    in_features,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write w = scale[row] * code for a tile of ROWS rows and COLUMNS columns."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    index = row * in_features + column
    mask = (row < out_features) & (column < in_features)
    scales = tl.load(scales_ptr + tl.minimum(row, out_features - 1))
    weight = tl.load(codes_ptr + index, mask=mask, other=0).to(tl.float32) * scales
    tl.store(out_ptr + index, rounded(weight, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def int8_linear(
    out_ptr,
    x_ptr,
    codes_ptr,
    scales_ptr,
    tokens,
    out_features,
    in_features,
    steps,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write y = x Wᵀ over this split's `steps` tiles of COLUMNS columns."""
    token = tl.arange(0, TOKENS)
    out_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(out_row, out_features - 1).to(tl.int64)
    scales = tl.load(scales_ptr + row)[:, None]
    acc = tl.zeros((TOKENS, ROWS), tl.float32)
    for step in range(tl.program_id(1) * steps, tl.program_id(1) * steps + steps):
        column = step * COLUMNS + tl.arange(0, COLUMNS)
        inside = (column < in_features)[None, :]
        index = row[:, None] * in_features + column[None, :]
        codes = tl.load(codes_ptr + index, mask=inside, other=0)
        weight = rounded(codes.to(tl.float32) * scales, x_ptr.dtype.element_ty)
        mask = (token < tokens)[:, None] & inside
        x = tl.load(x_ptr + token[:, None] * in_features + column[None, :], mask=mask, other=0.0)
        acc = add_product(acc, x, tl.trans(weight))
    store_tokens(out_ptr, acc, token, out_row, tokens, out_features)
