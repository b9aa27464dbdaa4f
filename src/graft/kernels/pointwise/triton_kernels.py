"""The Triton kernels of norms and gates: float32 inside, rounded where transformers' modules round.

A norm's program takes one row of SIZE columns or fewer, a gate's SIZE numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graft.kernels.backend.triton_rounding import rounded


@triton.jit
def rms_norm(y_ptr, scale_ptr, x_ptr, weight_ptr, features, epsilon, SIZE: tl.constexpr):
    """Write y = weight * (x * scale) and scale = 1 / sqrt(mean(x²) + epsilon) of a row."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    mask = column < features
    x = tl.load(x_ptr + row * features + column, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / features + epsilon)
    normal = rounded(x * scale, y_ptr.dtype.element_ty).to(tl.float32)
    y = rounded(weight * normal, y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * features + column, y, mask=mask)
    tl.store(scale_ptr + row, scale)


@triton.jit
def rms_norm_backward(dx_ptr, grad_ptr, x_ptr, weight_ptr, scale_ptr, features, SIZE: tl.constexpr):
    """Write dx = scale (g - h mean(g h)) of a row, where g = grad * weight and h = x * scale."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    mask = column < features
    index = row * features + column
    grad = tl.load(grad_ptr + index, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + index, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + row)
    outward, normal = rounded(grad * weight, dx_ptr.dtype.element_ty).to(tl.float32), x * scale
    mean = tl.sum(outward * normal, 0) / features
    dx = rounded(scale * (outward - normal * mean), dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + index, dx, mask=mask)


@triton.jit
def silu_gate(out_ptr, gate_ptr, up_ptr, count, SIZE: tl.constexpr):
    """Write silu(gate) * up."""
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = index < count
    gate = tl.load(gate_ptr + index, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + index, mask=mask, other=0.0).to(tl.float32)
    silu = rounded(gate * tl.sigmoid(gate), out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + index, rounded(silu * up, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def silu_gate_backward(d_gate_ptr, d_up_ptr, grad_ptr, gate_ptr, up_ptr, count, SIZE: tl.constexpr):
    """Write the gradients of gate and up."""
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = index < count
    grad = tl.load(grad_ptr + index, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + index, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + index, mask=mask, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    slope = share * (1.0 + gate * (1.0 - share))
    d_silu = rounded(grad * up, d_gate_ptr.dtype.element_ty).to(tl.float32)
    silu = rounded(gate * share, d_gate_ptr.dtype.element_ty).to(tl.float32)
    tl.store(d_gate_ptr + index, rounded(d_silu * slope, d_gate_ptr.dtype.element_ty), mask=mask)
    tl.store(d_up_ptr + index, rounded(grad * silu, d_gate_ptr.dtype.element_ty), mask=mask)
