"""RMSNorm and SiLU gates in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from graft.kernels.backend.reference import reference


@reference.implements("rms_norm")
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Compute weight * (x * scale) with the mean square in float32."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1) + epsilon)
    return weight * (wide * scale[..., None]).to(x.dtype), scale


@reference.implements("rms_norm_backward")
def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Compute scale (g - h mean(g h)) in float32."""
    outward, normal = (grad * weight).float(), x.float() * scale[..., None]
    mean = (outward * normal).mean(-1, keepdim=True)
    return (scale[..., None] * (outward - normal * mean)).to(x.dtype)


@reference.implements("silu_gate")
def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) * up."""
    return functional.silu(gate) * up


@reference.implements("silu_gate_backward")
def silu_gate_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of gate and up."""
    share = gate.float().sigmoid()
    slope = share * (1 + gate.float() * (1 - share))
    d_gate = ((grad * up).float() * slope).to(gate.dtype)
    return d_gate, grad * functional.silu(gate)
