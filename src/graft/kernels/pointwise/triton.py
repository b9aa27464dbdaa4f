"""The Triton backend's norms, gates, rotary positions and cross-entropy.

One kernel each, where plain PyTorch takes up to a dozen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graft.kernels.backend.triton_launch import DTYPES, launch, tiles, triton
from graft.kernels.pointwise import reference

_LONGEST_ROW = 1 << 14
"""Features of the longest row that a program's registers hold."""
_SIZE = 1024
_LOGITS = 4096
"""Logits that a program of the cross-entropy takes at once."""


def _computes(first: Tensor, *others: Tensor) -> bool:
    return first.dtype in DTYPES and all(other.dtype == first.dtype for other in others)


def _row_size(features: int) -> dict[str, int]:
    """Return the constants of a program that takes a row of so many features."""
    size = 1 << (features - 1).bit_length()
    return {"SIZE": size, "num_warps": max(1, min(8, size // 256))}


@triton.implements("rms_norm")
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Compute weight * (x * scale) and scale, a row at a time."""
    features = x.shape[-1]
    if not _computes(x, weight) or features > _LONGEST_ROW or not x.numel():
        return reference.rms_norm(x, weight, epsilon)
    rows = x.contiguous()
    y, scale = torch.empty_like(rows), x.new_empty(x.shape[:-1], dtype=torch.float32)
    arguments = scale, rows, weight.contiguous(), features, epsilon
    launch("rms_norm", (scale.numel(),), y, *arguments, **_row_size(features))
    return y, scale


@triton.implements("rms_norm_backward")
def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Compute scale (g - h mean(g h)), a row at a time."""
    features = x.shape[-1]
    if not _computes(x, weight, grad) or features > _LONGEST_ROW or not x.numel():
        return reference.rms_norm_backward(grad, x, weight, scale)
    operands = [tensor.contiguous() for tensor in (grad, x, weight, scale)]
    dx = torch.empty_like(operands[1])
    launch("rms_norm_backward", (scale.numel(),), dx, *operands, features, **_row_size(features))
    return dx


@triton.implements("silu_gate")
def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) * up."""
    if not _computes(gate, up) or not gate.numel():
        return reference.silu_gate(gate, up)
    gate, up = gate.contiguous(), up.contiguous()
    out, count = torch.empty_like(gate), gate.numel()
    launch("silu_gate", (tiles(count, _SIZE),), out, gate, up, count, SIZE=_SIZE)
    return out


@triton.implements("silu_gate_backward")
def silu_gate_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of gate and up."""
    if not _computes(gate, up, grad) or not gate.numel():
        return reference.silu_gate_backward(grad, gate, up)
    operands = [tensor.contiguous() for tensor in (grad, gate, up)]
    d_gate, d_up = torch.empty_like(operands[1]), torch.empty_like(operands[2])
    arguments = d_up, *operands, gate.numel()
    launch("silu_gate_backward", (tiles(gate.numel(), _SIZE),), d_gate, *arguments, SIZE=_SIZE)
    return d_gate, d_up


@triton.implements("rotary")
def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """Compute x cos + r(x) sin of both, or back, in one launch; a program takes a token."""
    if not _computes(q, k, cos, sin) or q.shape[-1] & 1 or not q.numel():
        return reference.rotary(q, k, cos, sin, back)
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    out_q, out_k = _by_token(q), _by_token(k)
    batch, heads, length, head_dim = q.shape
    half = head_dim // 2
    strides = [stride for x in (out_q, out_k, q, k) for stride in x.stride()[:3]]
    shared = 0 if cos.shape[0] == 1 else length * head_dim
    sizes = heads, k.shape[1], length, half, shared
    constants = {
        "BACK": back,
        "HEADS": 1 << (max(heads, k.shape[1]) - 1).bit_length(),
        "HALF": 1 << (half - 1).bit_length(),
    }
    arguments = out_k, q, k, cos.contiguous(), sin.contiguous(), *strides, *sizes
    launch("rotary", (batch * length, 2), out_q, *arguments, **constants)
    return out_q, out_k


def _by_token(x: Tensor) -> Tensor:
    """Return a new tensor like x [batch, heads, length, head_dim] in which a token's heads adjoin.

    So a projection's output lies, and the gradient that goes back to it must.
    """
    batch, heads, length, head_dim = x.shape
    return x.new_empty(batch, length, heads, head_dim).transpose(1, 2)


@triton.implements("cross_entropy")
def cross_entropy(
    logits: Tensor, targets: Tensor, losses: Tensor, gradient: Tensor | None, ignores: bool
) -> None:
    """Write losses and gradient in one launch; a program takes a token."""
    tokens, vocabulary = logits.shape
    lies = all(x is None or (x.is_contiguous() and x.dtype in DTYPES) for x in (logits, gradient))
    if not lies or not losses.is_contiguous() or not tokens:
        reference.cross_entropy(logits, targets, losses, gradient, ignores)
        return
    size = min(_LOGITS, 1 << (vocabulary - 1).bit_length())
    arguments = gradient, logits, targets.contiguous(), vocabulary
    launch("cross_entropy", (tokens,), losses, *arguments, SIZE=size, num_warps=8)
