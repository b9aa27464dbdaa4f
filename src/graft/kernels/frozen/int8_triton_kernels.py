"""The Triton kernels of int8 weights, w = scale[row] * code."""

from __future__ import annotations

import triton
import triton.language as tl

from graft.kernels.backend.triton_products import add_product, store_tokens
from graft.kernels.backend.triton_rounding import rounded


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
