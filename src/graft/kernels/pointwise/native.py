"""RMSNorm and SiLU gates by the native kernels (csrc/pointwise.inc)."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.kernels.backend.native_library import COMPUTE, DTYPES, address, call, native
from graft.kernels.frozen.native import token_count
from graft.kernels.pointwise import reference


def _computes(first: Tensor, *others: Tensor) -> bool:
    return first.dtype in COMPUTE and all(other.dtype == first.dtype for other in others)


@native.implements("rms_norm")
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Compute weight * (x * scale) and scale."""
    if not _computes(x, weight):
        return reference.rms_norm(x, weight, epsilon)
    rows, factors = x.contiguous(), weight.contiguous()
    y, scale = torch.empty_like(rows), x.new_empty(x.shape[:-1], dtype=torch.float32)
    sizes = token_count(x), x.shape[-1]
    operands = address(rows), address(factors)
    call("rms_norm", DTYPES[x.dtype], *operands, *sizes, epsilon, address(y), address(scale))
    return y, scale


@native.implements("rms_norm_backward")
def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Compute scale (g - h mean(g h)) in one pass over grad and x."""
    if not _computes(x, weight, grad):
        return reference.rms_norm_backward(grad, x, weight, scale)
    operands = [tensor.contiguous() for tensor in (grad, x, weight, scale)]
    dx = torch.empty_like(operands[1])
    addresses = map(address, operands)
    call("rms_norm_backward", DTYPES[x.dtype], *addresses, token_count(x), x.shape[-1], address(dx))
    return dx


@native.implements("silu_gate")
def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) * up."""
    if not _computes(gate, up):
        return reference.silu_gate(gate, up)
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    call("gate", DTYPES[gate.dtype], address(gate), address(up), gate.numel(), address(out))
    return out


@native.implements("silu_gate_backward")
def silu_gate_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of gate and up in one pass."""
    if not _computes(gate, up, grad):
        return reference.silu_gate_backward(grad, gate, up)
    operands = [tensor.contiguous() for tensor in (grad, gate, up)]
    d_gate, d_up = torch.empty_like(operands[1]), torch.empty_like(operands[2])
    addresses = [address(tensor) for tensor in operands]
    outputs = address(d_gate), address(d_up)
    call("gate_backward", DTYPES[gate.dtype], *addresses, gate.numel(), *outputs)
    return d_gate, d_up
