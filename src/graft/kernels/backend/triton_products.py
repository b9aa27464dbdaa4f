"""What the Triton kernels of fused products share."""

from __future__ import annotations

import triton
import triton.language as tl

from graft.kernels.backend.triton_rounding import INTERPRETED, rounded


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
