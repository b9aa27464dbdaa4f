"""The operations of training inside the quantiser: a latent weight that is rounded anew each time.

The latent weight is W + scaling B A, and its code q = round((W + scaling B A - offset) / scale),
kept within 0 and 2^bits - 1. The grid of the codes does not move; the scales and offsets that the
codes are multiplied out with may, in units of the scales, as in affine tuning.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import graft.kernels.latent.native
import graft.kernels.latent.reference
import graft.kernels.latent.triton  # noqa: F401  (these modules register the operations)
from graft.kernels.backend.operation import Operation
from graft.kernels.backend.registry import implementation
from graft.kernels.frozen.ops import int_group_dequantize, int_group_grad_input
from graft.kernels.low_rank.ops import token_product
from graft.kernels.moves.ops import moved_statistics
from graft.kernels.packed.planes import BLOCK, empty_planes
from graft.kernels.packed.weight import Latent


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
) -> tuple[Tensor, Tensor]:
    """Return the packed (codes, codes_high) of a latent weight [out_features, in_features].

    Float32 throughout: the terms of B A are added in their order, so that every backend rounds the
    same numbers. codes_high is empty unless bits is 3.
    """
    compute = implementation("latent_codes", weight.device)
    codes, high = compute(Latent(weight, scales, offsets, A, B, scaling, bits, group_size))
    return codes, codes.new_empty(0) if high is None else high


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
) -> tuple[Tensor, Tensor]:
    codes, high = empty_planes(weight, bits)
    return codes, codes.new_empty(0) if high is None else high


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


def kept_weight(
    weight: Tensor, weight_scales: Tensor | None, weight_offsets: Tensor | None, group_size: int
) -> Tensor:
    """Return a latent weight that is kept in 8 bits in float32, any other as it is."""
    if weight_scales is None or weight_offsets is None:
        return weight
    packed = whole_blocks(weight), None, weight_scales, weight_offsets
    out: Tensor = int_group_dequantize(*packed, 8, group_size, weight.shape[1], torch.float32)
    return out


def _moved(
    scales: Tensor, offsets: Tensor, u: Tensor | None, v: Tensor | None
) -> tuple[Tensor, Tensor]:
    if u is None or v is None:
        return scales, offsets
    return moved_statistics(scales, offsets, u.detach(), v.detach())


@Operation
def latent_linear(
    x: Tensor,
    weight: Tensor,
    weight_scales: Tensor | None,
    weight_offsets: Tensor | None,
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
    and the grid to u and v). The weight is rounded once more in the backward pass. With scales and
    offsets of its own it is kept in 8 bits, and multiplied out for the time of the call.
    """
    dense = kept_weight(weight, weight_scales, weight_offsets, group_size)
    latent = Latent(dense, scales, offsets, A, B, scaling, bits, group_size)
    codes, high = implementation("latent_codes", x.device)(latent)
    moved = _moved(scales, offsets, u, v)
    compute = implementation("int_group_linear", x.device)
    y: Tensor = compute(x, codes, high, *moved, bits, group_size)
    return y


@latent_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    weight_scales: Tensor | None,
    weight_offsets: Tensor | None,
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
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _latent_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scaling, u, v, ctx.bits, ctx.group_size = inputs
    ctx.save_for_backward(*tensors, u, v)


def _latent_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, kept, kept_scales, kept_offsets, scales, offsets, A, B, u, v = ctx.saved_tensors
    A, B = A.detach(), B.detach()
    bits, group_size = ctx.bits, ctx.group_size
    weight = kept_weight(kept, kept_scales, kept_offsets, group_size)
    latent = weight, scales, offsets, A, B, ctx.scaling, bits, group_size
    grad, grad_x = grad.contiguous(), None
    if ctx.needs_input_grad[0]:
        codes, high = latent_codes(*latent)
        packed = codes, high if bits == 3 else None, *_moved(scales, offsets, u, v)
        grad_x = int_group_grad_input(grad, *packed, bits, group_size, x.shape[-1])
    grad_weight, grad_u, grad_v = latent_grads(token_product(grad, x), *latent)
    grad_A = (B.T @ grad_weight) * ctx.scaling
    grad_B = (grad_weight @ A.T) * ctx.scaling
    if u is None:
        grad_u = grad_v = None
    return grad_x, *5 * [None], grad_A, grad_B, None, grad_u, grad_v, None, None


latent_linear.register_autograd(_latent_backward, setup_context=_latent_save)
