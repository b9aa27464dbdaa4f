"""The operations of affine tuning: a grid moved in units of its own scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from graft.kernels.ops import int_group_grad_input, int_group_grad_statistics
from graft.kernels.registry import implementation


@custom_op("graft::move_scaled", mutates_args=())
def move_scaled(values: Tensor, scales: Tensor, moves: Tensor, stored: torch.dtype) -> Tensor:
    """Return stored(values + scales * moves), taken in float64, as float32 [out_features, groups].

    Differentiable in the moves, float32, straight through the rounding.
    """
    compute = implementation("move_scaled", values.device)
    out: Tensor = compute(values, scales, moves, stored).to(torch.float32, copy=True)
    return out


@move_scaled.register_fake
def _(values: Tensor, scales: Tensor, moves: Tensor, stored: torch.dtype) -> Tensor:
    return torch.empty_like(values, dtype=torch.float32)


def _scaled_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _scaled_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return None, None, grad * ctx.saved_tensors[0], None


move_scaled.register_autograd(_scaled_backward, setup_context=_scaled_save)


@custom_op("graft::affine_linear", mutates_args=())
def affine_linear(
    x: Tensor,
    codes: Tensor,
    codes_high: Tensor | None,
    scales: Tensor,
    offsets: Tensor,
    bits: int,
    group_size: int,
    u: Tensor,
    v: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, moved scales, moved offsets); y is differentiable in x, u and v.

    The statistics move as a merge moves them, by `move_scaled`, and are kept in their own dtype for
    the backward pass, where du = scales * d scales' and dv = scales * d offsets' (straight through
    the rounding) come from one product.
    """
    move = implementation("move_scaled", x.device)
    moved = move(scales, scales, u, scales.dtype), move(offsets, scales, v, offsets.dtype)
    compute = implementation("int_group_linear", x.device)
    return compute(x, codes, codes_high, *moved, bits, group_size), *moved


@affine_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    codes_high: Tensor | None,
    scales: Tensor,
    offsets: Tensor,
    bits: int,
    group_size: int,
    u: Tensor,
    v: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], codes.shape[0]))
    return y, torch.empty_like(scales), torch.empty_like(offsets)


def _affine_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, codes, codes_high, scales, _, ctx.bits, ctx.group_size, _, _ = inputs
    ctx.save_for_backward(x, codes, codes_high, scales, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _affine_backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, codes, codes_high, scales, *moved = ctx.saved_tensors
    grad, options = grad.contiguous(), (ctx.bits, ctx.group_size)
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = int_group_grad_input(grad, codes, codes_high, *moved, *options, x.shape[-1])
    both = int_group_grad_statistics(grad, x, codes, codes_high, *options, scales)
    return grad_x, *6 * [None], *both


affine_linear.register_autograd(_affine_backward, setup_context=_affine_save)
