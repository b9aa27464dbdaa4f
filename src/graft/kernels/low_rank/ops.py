"""The operations of adapted layers: a frozen weight and its low-rank update in one.

A layer saves what its gradients need once: x for LoRA (its group sums for QA-LoRA), the small
hidden matrix, and the packed weight, which it shares. A and B are float32 and take part in x's
dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import graft.kernels.backends  # noqa: F401  (registers them)
from graft.kernels.backend.operation import Operation
from graft.kernels.backend.registry import implementation
from graft.kernels.frozen.ops import grad_input
from graft.kernels.low_rank.reference import hidden_and_gradient
from graft.kernels.packed.weight import Weight, save_weight, saved_weight

# LoRA: y = x Wᵀ + hidden Bᵀ, hidden = scaling x Aᵀ ------------------------------------------------


@Operation
def lora_linear(
    x: Tensor, weight: Weight, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return (y, hidden); y is differentiable in x, A and B (LoRA, arXiv 2106.09685, eq. 3)."""
    out: tuple[Tensor, Tensor] = implementation("lora_linear", x.device)(x, weight, A, B, scaling)
    return out


@lora_linear.register_fake
def _(x: Tensor, weight: Weight, A: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    rows = x.shape[:-1]
    return x.new_empty((*rows, B.shape[0])), x.new_empty((*rows, A.shape[0]))


@Operation
def lora_grad_input(
    grad: Tensor, weight: Weight, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return (dx = dy W + hidden A, hidden = scaling dy B)."""
    compute = implementation("lora_grad_input", grad.device)
    out: tuple[Tensor, Tensor] = compute(grad, weight, A, B, scaling)
    return out


@lora_grad_input.register_fake
def _(grad: Tensor, weight: Weight, A: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    rows = grad.shape[:-1]
    return grad.new_empty((*rows, A.shape[1])), grad.new_empty((*rows, A.shape[0]))


@Operation
def token_product(a: Tensor, b: Tensor) -> Tensor:
    """Return aᵀ b summed over all tokens, float32 [a's features, b's features]."""
    out: Tensor = implementation("token_product", a.device)(a, b)
    return out


@token_product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[-1], b.shape[-1]), dtype=torch.float32)


def _lora_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, A, B, ctx.scaling = inputs
    save_weight(ctx, weight, x, A, B, output[1])
    ctx.set_materialize_grads(False)


def _lora_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    weight, (x, A, B, hidden) = saved_weight(ctx)
    grad = grad.contiguous()
    grad_x = None
    if ctx.needs_input_grad[0]:
        low_rank = A.detach(), B.detach(), ctx.scaling
        grad_x, grad_hidden = lora_grad_input(grad, weight, *low_rank)
    else:
        grad_hidden = (grad @ B.detach().to(grad.dtype)) * ctx.scaling
    grad_A = token_product(grad_hidden, x)
    grad_B = token_product(grad, hidden)
    return grad_x, None, grad_A, grad_B, None


lora_linear.register_autograd(_lora_backward, setup_context=_lora_save)

# QA-LoRA: y = x Wᵀ with the offsets moved by scaling B A ----------------------------------------


@Operation
def move_offsets(
    offsets: Tensor, A: Tensor, B: Tensor, scaling: float, stored: torch.dtype
) -> Tensor:
    """Return stored(offsets + scaling B A), summed in float64, as float32 [out_features, groups].

    Differentiable in A and B, straight through the rounding.
    """
    compute = implementation("move_offsets", offsets.device)
    out: Tensor = compute(offsets, A, B, scaling, stored)
    return out


@move_offsets.register_fake
def _(offsets: Tensor, A: Tensor, B: Tensor, scaling: float, stored: torch.dtype) -> Tensor:
    return torch.empty_like(offsets, dtype=torch.float32)


def _move_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, A, B, ctx.scaling, _ = inputs
    ctx.save_for_backward(A, B)


def _move_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    A, B = ctx.saved_tensors
    return None, (B.T @ grad) * ctx.scaling, (grad @ A.T) * ctx.scaling, None, None


move_offsets.register_autograd(_move_backward, setup_context=_move_save)


def low_rank_product(A: Tensor, B: Tensor) -> Tensor:
    """Return B A, float32 [out_features, groups], summed in float64 in one order everywhere."""
    nothing = A.new_zeros(B.shape[0], A.shape[1])
    out: Tensor = move_offsets(nothing, A, B, 1.0, torch.float32)
    return out


@Operation
def qalora_linear(
    x: Tensor, weight: Weight, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return (y, pooled = group sums of x); y is differentiable in x, A and B.

    The offsets are moved and rounded to their own dtype by `move_offsets`, as a merge moves them.
    With the gradient passed straight through that rounding, those of A and B are LoRA's on the
    pooled inputs (QA-LoRA, arXiv 2309.14717, section 3.3): no [out_features, groups] gradient of
    the offsets is formed.
    """
    scales, offsets = weight.statistics
    moved = implementation("move_offsets", x.device)(offsets, A, B, scaling, offsets.dtype)
    y = implementation("linear", x.device)(x, weight.moved(scales, moved))
    return y, implementation("pool", x.device)(x, weight.layout.group_size)


@qalora_linear.register_fake
def _(x: Tensor, weight: Weight, A: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    rows = x.shape[:-1]
    return x.new_empty((*rows, B.shape[0])), x.new_empty((*rows, A.shape[1]))


def _qalora_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, weight, A, B, ctx.scaling = inputs
    save_weight(ctx, weight, output[1], A, B)
    ctx.set_materialize_grads(False)


def _qalora_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    weight, (pooled, A, B) = saved_weight(ctx)
    grad, A, B = grad.contiguous(), A.detach(), B.detach()
    grad_x = None
    if ctx.needs_input_grad[0]:
        scales, offsets = weight.statistics
        moved = move_offsets(offsets, A, B, ctx.scaling, offsets.dtype)
        grad_x = grad_input(grad, weight.moved(scales, moved))
    hidden, grad_hidden = hidden_and_gradient(grad, pooled, A, B, ctx.scaling)
    grad_A = token_product(grad_hidden, pooled)
    grad_B = token_product(grad, hidden)
    return grad_x, None, grad_A, grad_B, None


qalora_linear.register_autograd(_qalora_backward, setup_context=_qalora_save)
