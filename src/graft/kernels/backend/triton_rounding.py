"""How the Triton kernels round, compiled and interpreted alike."""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter truncates where it converts to bfloat16 and multiplies bfloat16 by bit pattern.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """Round float32 values to `dtype`, to nearest even (interpreted bfloat16 stays in float32)."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True)
    else:
        return values.to(dtype)
