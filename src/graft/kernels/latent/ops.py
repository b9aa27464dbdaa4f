"""The operations of training inside the quantiser: a latent weight that is rounded anew each time.

The latent weight is W + scaling B A, and its code q = round((W + scaling B A - offset) / scale),
kept within 0 and 2^bits - 1. The grid of the codes does not move; the scales and offsets that the
codes are multiplied out with may, in units of the scales, as in affine tuning.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import graft.kernels.backends  # noqa: F401  (registers them)
from graft.kernels.backend.operation import Operation
from graft.kernels.backend.registry import implementation
from graft.kernels.frozen.ops import dequantize, grad_input
from graft.kernels.low_rank.ops import token_product
from graft.kernels.moves.ops import moved_weight
from graft.kernels.packed.planes import BLOCK, empty_planes
from graft.kernels.packed.weight import (
    Latent,
    Layout,
    Weight,
    int_group_weight,
    save_weight,
    saved_weight,
)


@Operation
def latent_codes(
    weight: Tensor,
    scales: Tensor,
    offsets: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    scaling: float,
    bits: int,
    group_size: int,
) -> list[Tensor]:
    """Return the packed planes of a latent weight [out_features, in_features].

    Float32 throughout: the terms of B A are added in their order, so that every backend rounds the
    same numbers.
    """
    compute = implementation("latent_codes", weight.device)
    planes: list[Tensor]
    planes = compute(Latent(weight, scales, offsets, A, B, scaling, bits, group_size))
    return planes


@latent_codes.register_fake
def _(
    weight: Tensor,
    scales: Tensor,
    offsets: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    scaling: float,
    bits: int,
    group_size: int,
) -> list[Tensor]:
    return empty_planes(weight, bits)


@Operation
def latent_grads(
    product: Tensor,
    weight: Tensor,
    scales: Tensor,
    offsets: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    bits: int,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what product = dyᵀ x float32 [out_features, in_features] says of W, u and v.

    dW: product where W lies within the grid's range, 0 elsewhere (straight through the rounding);
    du = scale * groupsum(product * q), dv = scale * groupsum(product), float32
    [out_features, groups].
    """
    compute = implementation("latent_grads", weight.device)
    latent = Latent(weight, scales, offsets, A, B, scaling, bits, group_size)
    grads: tuple[Tensor, Tensor, Tensor] = compute(product, latent)
    return grads


@latent_grads.register_fake
def _(
    product: Tensor,
    weight: Tensor,
    scales: Tensor,
    offsets: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    bits: int,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    u, v = (torch.empty_like(scales, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(product), u, v


def whole_blocks(codes: Tensor) -> Tensor:
    """Return 8-bit codes [rows, columns] as they are packed: filled up to whole blocks."""
    missing = -codes.shape[1] % BLOCK
    # Padding by nothing would copy, and autograd would keep the copy of every layer.
    return torch.nn.functional.pad(codes, (0, missing)) if missing else codes


def kept_weight(weight: Weight) -> Tensor:
    """Return a latent weight that is kept in 8 bits in float32, a dense one as it is."""
    first = weight.tensors[0]
    assert first is not None
    return first if weight.layout.kind == "dense" else dequantize(weight, torch.float32)


def _rounded(
    weight: Weight,
    latent: Latent,
    planes: list[Tensor],
    u: Tensor | None,
    v: Tensor | None,
) -> Weight:
    """Return the int group weight of a latent weight's codes, on the grid moved by u and v."""
    shape = weight.layout.out_features, weight.layout.in_features
    layout = Layout("int_group", *shape, latent.bits, latent.group_size)
    rounded = int_group_weight(planes, latent.scales, latent.offsets, layout)
    if u is None or v is None:
        return rounded
    return moved_weight(rounded, u.detach(), v.detach())


@Operation
def latent_linear(
    x: Tensor,
    weight: Weight,
    scales: Tensor,
    offsets: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    u: Tensor | None,
    v: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """Return y = x Wᵀ, W the rounded weight on the grid moved by u and v, or where it is.

    Differentiable in x, A, B, u and v, straight through both roundings (L4Q, arXiv 2402.04902;
    there the grid of the codes moves too, here it stays, so that the codes answer to A and B alone
    and the grid to u and v). The weight is rounded once more in the backward pass. One that is kept
    in 8 bits is multiplied out for the time of the call.
    """
    kept = kept_weight(weight)
    latent = Latent(kept, scales, offsets, A, B, scaling, bits, group_size)
    rounded = _rounded(weight, latent, implementation("latent_codes", x.device)(latent), u, v)
    y: Tensor = implementation("linear", x.device)(x, rounded)
    return y


@latent_linear.register_fake
def _(
    x: Tensor,
    weight: Weight,
    scales: Tensor,
    offsets: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    u: Tensor | None,
    v: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.layout.out_features))


def _latent_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scales, offsets, A, B, ctx.scaling, u, v, ctx.bits, ctx.group_size = inputs
    save_weight(ctx, weight, x, scales, offsets, A, B, u, v)


def _latent_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weight, (x, scales, offsets, A, B, u, v) = saved_weight(ctx)
    A, B = A.detach(), B.detach()
    kept = kept_weight(weight)
    latent = Latent(kept, scales, offsets, A, B, ctx.scaling, ctx.bits, ctx.group_size)
    grad, grad_x = grad.contiguous(), None
    if ctx.needs_input_grad[0]:
        grad_x = grad_input(grad, _rounded(weight, latent, latent_codes(*latent), u, v))
    grad_weight, grad_u, grad_v = latent_grads(token_product(grad, x), *latent)
    grad_A = (B.T @ grad_weight) * ctx.scaling
    grad_B = (grad_weight @ A.T) * ctx.scaling
    if u is None:
        grad_u = grad_v = None
    return grad_x, *3 * [None], grad_A, grad_B, None, grad_u, grad_v, None, None


latent_linear.register_autograd(_latent_backward, setup_context=_latent_save)
