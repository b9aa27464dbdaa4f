"""The Triton kernels of codebook weights, w = codebook[code] * absmax.

The packed layout is read as it lies on disk (`graft.kernels.packed`). An index beyond the packed
weight is clamped, and what it reads is multiplied with an x of zero or never written: so these
reads need no masks, which would break the wide loads up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graft.kernels.backend.triton_products import add_product, store_tokens
from graft.kernels.backend.triton_rounding import rounded


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


@triton.jit
def codebook_vector(
    out_ptr,
    x_ptr,
    codes_ptr,
    absmax_ptr,
    dynamic_ptr,
    scale_ptr,
    offset_ptr,
    table_ptr,
    out_features,
    in_features,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Write y = x Wᵀ of one token for ROWS rows, which hold whole blocks, BLOCKS at a time."""
    BYTES: tl.constexpr = BLOCK // 2
    blocks = in_features // BLOCK
    out_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(out_row, out_features - 1).to(tl.int64)[:, None, None]
    byte = tl.arange(0, BYTES)[None, None, :]
    column = tl.arange(0, BLOCKS * BLOCK)
    table = tl.load(table_ptr + tl.arange(0, 16))
    acc = tl.zeros((ROWS, BLOCKS * BLOCK), tl.float32)
    for start in range(0, blocks, BLOCKS):
        block = tl.minimum(start + tl.arange(0, BLOCKS), blocks - 1)[None, :, None]
        index = row * blocks + block
        packed = tl.load(codes_ptr + index * BYTES + byte)
        weight = tl.reshape(codebook_values(packed, table), (ROWS, BLOCKS, BLOCK))
        absmax = codebook_absmax(absmax_ptr, dynamic_ptr, scale_ptr, offset_ptr, index, NESTED)
        weight = tl.reshape(weight * absmax, (ROWS, BLOCKS * BLOCK))
        here = start * BLOCK + column
        x = tl.load(x_ptr + here, mask=here < in_features, other=0.0).to(tl.float32)
        acc += rounded(weight, x_ptr.dtype.element_ty).to(tl.float32) * x[None, :]
    y = rounded(tl.sum(acc, 1), out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_row, y, mask=out_row < out_features)
