"""The operations of grids that move in units of their own scales: affine tuning and QA-LoRA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import graft.kernels.backends  # noqa: F401  (registers them)
from graft.kernels.backend.operation import Operation
from graft.kernels.backend.registry import implementation
from graft.kernels.frozen.ops import grad_input, int_group_grad_statistics
from graft.kernels.packed.weight import Weight, save_weight, saved_weight


@Operation
def move_scaled(values: Tensor, scales: Tensor, moves: Tensor, stored: torch.dtype) -> Tensor:
    """Return stored(values + scales * moves) [out_features, groups], taken in float64."""
    compute = implementation("move_scaled", values.device)
    out: Tensor = compute(values, scales, moves, stored)
    return out


@move_scaled.register_fake
def _(values: Tensor, scales: Tensor, moves: Tensor, stored: torch.dtype) -> Tensor:
    return torch.empty_like(values, dtype=stored)


class _MoveThrough(torch.autograd.Function):
    """`move_scaled`, handed out as float32, whose gradient would not fit into float16."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, scales: Tensor, moves: Tensor, stored: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(scales)
        moved: Tensor = move_scaled(values, scales, moves, stored)
        return moved.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor, None]:
        return None, None, grads[0] * ctx.saved_tensors[0], None


def moved_through(values: Tensor, scales: Tensor, moves: Tensor, stored: torch.dtype) -> Tensor:
    """Return `move_scaled` as float32, differentiable in the moves past the rounding."""
    moved: Tensor = _MoveThrough.apply(values, scales, moves, stored)  # type: ignore[no-untyped-call]
    return moved


def moved_statistics(
    scales: Tensor, offsets: Tensor, u: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Return scales + scales u and offsets + scales v, rounded as they are stored."""
    return (
        move_scaled(scales, scales, u, scales.dtype),
        move_scaled(offsets, scales, v, offsets.dtype),
    )


def moved_weight(weight: Weight, u: Tensor, v: Tensor) -> Weight:
    """Return an int group weight on the grid that `moved_statistics` moves."""
    return weight.moved(*moved_statistics(*weight.statistics, u, v))


def _output_of(x: Tensor, weight: Weight, *rest: Any) -> Tensor:
    """Return an output of the right shape, without computing it."""
    return x.new_empty((*x.shape[:-1], weight.layout.out_features))


@Operation
def affine_linear(x: Tensor, weight: Weight, u: Tensor, v: Tensor) -> Tensor:
    """Return y = x Wᵀ, W on the grid moved by u and v; differentiable in x, u and v.

    The statistics move as a merge moves them, and once more in the backward pass, where
    du = scales * d scales' and dv = scales * d offsets' (straight through the rounding) come from
    one product.
    """
    y: Tensor = implementation("linear", x.device)(x, moved_weight(weight, u, v))
    return y


affine_linear.register_fake(_output_of)


def _affine_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, u, v = inputs
    save_weight(ctx, weight, x, u, v)


def _affine_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weight, (x, u, v) = saved_weight(ctx)
    grad, grad_x = grad.contiguous(), None
    if ctx.needs_input_grad[0]:
        grad_x = grad_input(grad, moved_weight(weight, u.detach(), v.detach()))
    scales, _ = weight.statistics
    return grad_x, None, *int_group_grad_statistics(grad, x, weight, scales)


affine_linear.register_autograd(_affine_backward, setup_context=_affine_save)


# QA-LoRA that moves the scales too -----------------------------------------------------------


@Operation
def move_by_factors(
    scales: Tensor, offsets: Tensor, A: Tensor, B: Tensor, scaling: float, u_A: Tensor, u_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Return scales (1 + u_B u_A), rounded as they are stored, and `move_offsets`' offsets."""
    compute = implementation("move_by_factors", scales.device)
    moved: tuple[Tensor, Tensor] = compute(scales, offsets, A, B, scaling, u_A, u_B)
    return moved


@move_by_factors.register_fake
def _(
    scales: Tensor, offsets: Tensor, A: Tensor, B: Tensor, scaling: float, u_A: Tensor, u_B: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(scales), torch.empty_like(offsets, dtype=torch.float32)


@Operation
def grad_factors(
    grad: Tensor,
    x: Tensor,
    weight: Weight,
    A: Tensor,
    B: Tensor,
    scaling: float,
    u_A: Tensor,
    u_B: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of A, B, u_A and u_B as `qalora_grid_linear` has them; float32.

    Those of u_A and u_B take the group sums of q * (dyᵀ x), a product as large as y and dx. A
    backend may round dy and x to 7 bits for it, each feature in units of its largest number: the
    errors are as good as random, about a hundredth of each term. Those of A and B are exact.
    """
    compute = implementation("grad_factors", x.device)
    out: tuple[Tensor, Tensor, Tensor, Tensor]
    out = compute(grad, x, weight, A, B, scaling, u_A, u_B)
    return out


@grad_factors.register_fake
def _(grad: Tensor, x: Tensor, weight: Weight, A: Tensor, B: Tensor, *rest: Any) -> Any:
    return tuple(torch.empty_like(factor) for factor in (A, B, *rest[1:]))


@Operation
def qalora_grid_linear(
    x: Tensor, weight: Weight, A: Tensor, B: Tensor, scaling: float, u_A: Tensor, u_B: Tensor
) -> Tensor:
    """Return y = x Wᵀ, W with offsets + scaling B A and scales (1 + u_B u_A).

    Differentiable in x and the four factors, straight through the rounding. Nothing of the size of
    the statistics is kept between forward and backward.
    """
    scales, offsets = weight.statistics
    factors = A, B, scaling, u_A, u_B
    moved = implementation("move_by_factors", x.device)(scales, offsets, *factors)
    y: Tensor = implementation("linear", x.device)(x, weight.moved(*moved))
    return y


qalora_grid_linear.register_fake(_output_of)


def _qalora_grid_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, A, B, ctx.scaling, u_A, u_B = inputs
    save_weight(ctx, weight, x, A, B, u_A, u_B)


def _qalora_grid_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weight, (x, *saved) = saved_weight(ctx)
    A, B, u_A, u_B = (factor.detach() for factor in saved)
    factors = A, B, ctx.scaling, u_A, u_B
    grad, grad_x = grad.contiguous(), None
    if ctx.needs_input_grad[0]:
        moved = move_by_factors(*weight.statistics, *factors)
        grad_x = grad_input(grad, weight.moved(*moved))
    d_A, d_B, d_u_A, d_u_B = grad_factors(grad, x, weight, *factors)
    return grad_x, None, d_A, d_B, None, d_u_A, d_u_B


qalora_grid_linear.register_autograd(_qalora_grid_backward, setup_context=_qalora_grid_save)
