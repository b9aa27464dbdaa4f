"""The Triton kernels between products: float32 inside, rounded where transformers' modules round.

A norm's program takes one row of SIZE columns or fewer, a gate's SIZE numbers, a rotation's all
heads of a token, and the cross-entropy's a token.
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


@triton.jit
def rotate(
    out_ptr,
    x_ptr,
    cos_first,
    cos_second,
    sin_first,
    sin_second,
    out_batch,
    out_head,
    out_token,
    x_batch,
    x_head,
    x_token,
    batch,
    token,
    heads,
    half,
    BACK: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Write x cos + r(x) sin, or back, for a token's heads; of cos and sin both halves."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    mask = (head < heads) & (column < half)
    index = batch * x_batch + token * x_token + head * x_head + column
    first = tl.load(x_ptr + index, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + index + half, mask=mask, other=0.0).to(tl.float32)
    if BACK:
        turned_first = rounded(second * sin_second, dtype).to(tl.float32)
        turned_second = -rounded(first * sin_first, dtype).to(tl.float32)
    else:
        turned_first = rounded(-second * sin_first, dtype).to(tl.float32)
        turned_second = rounded(first * sin_second, dtype).to(tl.float32)
    first = rounded(rounded(first * cos_first, dtype).to(tl.float32) + turned_first, dtype)
    second = rounded(rounded(second * cos_second, dtype).to(tl.float32) + turned_second, dtype)
    index = batch * out_batch + token * out_token + head * out_head + column
    tl.store(out_ptr + index, first, mask=mask)
    tl.store(out_ptr + index + half, second, mask=mask)


@triton.jit
def rotary(
    out_q_ptr,
    out_k_ptr,
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    out_q_batch,
    out_q_head,
    out_q_token,
    out_k_batch,
    out_k_head,
    out_k_token,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    q_heads,
    k_heads,
    length,
    half,
    shared,
    BACK: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Rotate a token's queries, or in the grid's second row its keys."""
    index = tl.program_id(0).to(tl.int64)
    batch, token = index // length, index % length
    column = tl.arange(0, HALF)[None, :]
    at = batch * shared + token * (2 * half) + column
    mask = column < half
    cos_first = tl.load(cos_ptr + at, mask=mask, other=0.0).to(tl.float32)
    cos_second = tl.load(cos_ptr + at + half, mask=mask, other=0.0).to(tl.float32)
    sin_first = tl.load(sin_ptr + at, mask=mask, other=0.0).to(tl.float32)
    sin_second = tl.load(sin_ptr + at + half, mask=mask, other=0.0).to(tl.float32)
    if tl.program_id(1) == 0:
        rotate(
            out_q_ptr,
            q_ptr,
            cos_first,
            cos_second,
            sin_first,
            sin_second,
            out_q_batch,
            out_q_head,
            out_q_token,
            q_batch,
            q_head,
            q_token,
            batch,
            token,
            q_heads,
            half,
            BACK,
            HEADS,
            HALF,
        )
    else:
        rotate(
            out_k_ptr,
            k_ptr,
            cos_first,
            cos_second,
            sin_first,
            sin_second,
            out_k_batch,
            out_k_head,
            out_k_token,
            k_batch,
            k_head,
            k_token,
            batch,
            token,
            k_heads,
            half,
            BACK,
            HEADS,
            HALF,
        )


@triton.jit
def cross_entropy(
    losses_ptr, gradient_ptr, logits_ptr, targets_ptr, vocabulary, SIZE: tl.constexpr
):
    """Write a token's -log softmax[target], and softmax - onehot; of a target below 0 zeros."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    logits_ptr += row * vocabulary
    column = tl.arange(0, SIZE)
    largest = tl.full((SIZE,), float("-inf"), tl.float32)
    total = tl.zeros((SIZE,), tl.float32)
    for start in range(0, vocabulary, SIZE):
        mask = start + column < vocabulary
        logits = tl.load(logits_ptr + start + column, mask=mask, other=float("-inf"))
        logits = logits.to(tl.float32)
        now = tl.maximum(largest, logits, propagate_nan=tl.PropagateNan.ALL)
        # A lane that has seen nothing but -inf has a sum of zeros, not of exp(-inf + inf).
        unit = tl.where(now == float("-inf"), 0.0, now)
        total = total * tl.exp(largest - unit) + tl.exp(logits - unit)
        largest = now
    most = tl.max(largest, 0)
    total = tl.sum(total * tl.exp(largest - tl.where(most == float("-inf"), 0.0, most)), 0)
    asked = target >= 0
    at_target = tl.load(logits_ptr + tl.where(asked, target, 0)).to(tl.float32)
    tl.store(losses_ptr + row, tl.where(asked, tl.log(total) + (most - at_target), 0.0))
    if gradient_ptr is not None:
        gradient_ptr += row * vocabulary
        for start in range(0, vocabulary, SIZE):
            mask = start + column < vocabulary
            logits = tl.load(logits_ptr + start + column, mask=mask, other=float("-inf"))
            share = tl.exp(logits.to(tl.float32) - most) / total
            share = tl.where(start + column == target, share - 1.0, share)
            share = tl.where(asked, share, 0.0)
            share = rounded(share, gradient_ptr.dtype.element_ty)
            tl.store(gradient_ptr + start + column, share, mask=mask)
