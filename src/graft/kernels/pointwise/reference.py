"""RMSNorm, SiLU gates, rotary positions and cross-entropy in plain PyTorch."""

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


@reference.implements("rotary")
def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """Compute x cos + r(x) sin of both, or back, each product rounded by itself."""
    cos, sin = cos[:, None], sin[:, None]
    return _rotated(q, cos, sin, back), _rotated(k, cos, sin, back)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    first, second = (x * sin if back else x).chunk(2, dim=-1)
    halves = (second, -first) if back else (-second, first)
    turned = torch.cat(halves, dim=-1)
    # As q and k lie, which is how transformers' own sum lies too.
    return torch.add(x * cos, turned if back else turned * sin, out=torch.empty_like(x))


@reference.implements("cross_entropy")
def cross_entropy(
    logits: Tensor, targets: Tensor, losses: Tensor, gradient: Tensor | None, ignores: bool
) -> None:
    """Write -log softmax(logits)[target] to losses and softmax(logits) - onehot to gradient.

    logits, gradient: [tokens, vocabulary]; losses: float32 [tokens]. Where it ignores, a target
    below 0 has neither.
    """
    scores, target = logits.float(), targets[:, None]
    asked = target >= 0 if ignores else None
    target = target if asked is None else target.clamp(min=0)
    probabilities = scores.softmax(dim=-1)
    # The largest probability is exp(0) over the sum of the exponentials.
    log_sum = scores.amax(dim=-1) - probabilities.amax(dim=-1).log()
    losses.copy_(log_sum - scores.gather(1, target).squeeze(1))
    if gradient is not None:
        minus_one = torch.full_like(target, -1, dtype=torch.float32)
        gradient.copy_(probabilities.scatter_add_(1, target, minus_one))
    if asked is not None:
        losses.masked_fill_(~asked.squeeze(1), 0.0)
        if gradient is not None:
            gradient.masked_fill_(~asked, 0.0)
