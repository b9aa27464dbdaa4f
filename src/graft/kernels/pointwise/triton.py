"""The Triton backend's norms and gates: one kernel where plain PyTorch takes up to a dozen."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.kernels.backend.triton_launch import DTYPES, launch, tiles, triton
from graft.kernels.pointwise import reference

_LONGEST_ROW = 1 << 14
"""Features of the longest row that a program's registers hold."""
_SIZE = 1024


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
