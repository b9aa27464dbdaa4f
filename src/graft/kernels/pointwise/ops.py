"""What lies between a decoder's products: RMSNorm, SiLU gates, rotary positions, for each backend.

Numbers are rounded to the inputs' dtype where transformers' modules round them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import graft.kernels.backends  # noqa: F401  (registers them)
from graft.kernels.backend.operation import Operation
from graft.kernels.backend.registry import implementation


@Operation
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return (y, scale): y = weight * (x * scale), scale = 1 / sqrt(mean(x²) + epsilon).

    x [..., features]; scale float32 [...]. Differentiable in x (RMSNorm, arXiv 1910.07467, eq. 4).
    """
    out: tuple[Tensor, Tensor] = implementation("rms_norm", x.device)(x, weight, epsilon)
    return out


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@Operation
def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return dx = scale (g - h mean(g h)), where g = grad * weight and h = x * scale."""
    out: Tensor = implementation("rms_norm_backward", x.device)(grad, x, weight, scale)
    return out


@rms_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _norm_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _norm_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return rms_norm_backward(grad, *ctx.saved_tensors), None, None


rms_norm.register_autograd(_norm_backward, setup_context=_norm_save)


@Operation
def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up (SwiGLU, arXiv 2002.05202, eq. 6); differentiable in both."""
    out: Tensor = implementation("silu_gate", gate.device)(gate, up)
    return out


@silu_gate.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@Operation
def silu_gate_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up."""
    compute = implementation("silu_gate_backward", gate.device)
    out: tuple[Tensor, Tensor] = compute(grad, gate, up)
    return out


@silu_gate_backward.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _gate_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = silu_gate_backward(grad, *ctx.saved_tensors)
    return out


silu_gate.register_autograd(_gate_backward, setup_context=_gate_save)


@Operation
def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """Return q cos + r(q) sin and k cos + r(k) sin, r(x) = (-x2, x1) of x's two halves.

    q, k [batch, heads, length, head_dim], each with heads of its own; cos, sin [batch or 1, length,
    head_dim]. Differentiable in q and k: `back` is the transposed map, g cos + rᵀ(g sin)
    (RoFormer, arXiv 2104.09864, eq. 34).
    """
    out: tuple[Tensor, Tensor] = implementation("rotary", q.device)(q, k, cos, sin, back)
    return out


@rotary.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


def _rotary_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _rotary_backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    return *rotary(grad_q, grad_k, *ctx.saved_tensors, not ctx.back), None, None, None


rotary.register_autograd(_rotary_backward, setup_context=_rotary_save)
