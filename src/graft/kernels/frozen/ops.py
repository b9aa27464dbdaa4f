"""The operations of frozen weights: schema, fake kernel and gradient, once for every backend.

Shapes: x [..., in_features], grad (dy) [..., out_features], weights [out_features, in_features].
Statistics may be fp16 or float32 and are read as float32. Only x, and the scales and offsets of an
int group weight, are differentiable: codes are frozen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import graft.kernels.backends  # noqa: F401  (registers them)
from graft.kernels.backend.operation import Operation
from graft.kernels.backend.registry import implementation
from graft.kernels.packed.planes import empty_planes
from graft.kernels.packed.weight import (
    NESTED_BLOCK_SIZE,
    Weight,
    save_weight,
    saved_weight,
)

# A weight of any kind ----------------------------------------------------------------------------


@Operation
def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return the weight that the packed tensors stand for, rounded once to `dtype`."""
    first = weight.tensors[0]
    assert first is not None
    out: Tensor = implementation("dequantize", first.device)(weight, dtype)
    return out


@dequantize.register_fake
def _(weight: Weight, dtype: torch.dtype) -> Tensor:
    first, layout = weight.tensors[0], weight.layout
    assert first is not None
    return first.new_empty((layout.out_features, layout.in_features), dtype=dtype)


@Operation
def linear(x: Tensor, weight: Weight) -> Tensor:
    """Return y = x Wᵀ in x's dtype; differentiable in x, scales and offsets."""
    out: Tensor = implementation("linear", x.device)(x, weight)
    return out


@linear.register_fake
def _(x: Tensor, weight: Weight) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.layout.out_features))


@Operation
def grad_input(grad: Tensor, weight: Weight) -> Tensor:
    """Return dx = dy W."""
    out: Tensor = implementation("grad_input", grad.device)(grad, weight)
    return out


@grad_input.register_fake
def _(grad: Tensor, weight: Weight) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], weight.layout.in_features))


def trained_statistics(ctx: Any, weight: Weight) -> tuple[bool, bool]:
    """Return whether the scales and the offsets of a weight need gradients."""
    scales, offsets = ctx.needs_input_grad[3:5]  # the weight's third and fourth tensor
    is_grid = weight.layout.kind == "int_group"
    return is_grid and scales, is_grid and offsets


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight = inputs
    # x is needed for the statistics' gradients alone; a frozen layer does not keep it alive.
    save_weight(ctx, weight, x if any(trained_statistics(ctx, weight)) else None)


def linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Return the gradients of x and of the weight's parts, of what `save_weight` kept."""
    weight, (x,) = saved_weight(ctx)
    need_scales, need_offsets = trained_statistics(ctx, weight)
    grad = grad.contiguous()
    grad_x = grad_input(grad, weight) if ctx.needs_input_grad[0] else None
    if not (need_scales or need_offsets):
        return grad_x, None
    scales, offsets = weight.statistics
    grad_scales = grad_offsets = None
    if need_scales:
        both = int_group_grad_statistics(grad, x, weight, None)
        grad_scales = both[0].to(scales.dtype)
        grad_offsets = both[1].to(offsets.dtype) if need_offsets else None
    else:
        grad_offsets = int_group_grad_offsets(grad, x, weight.layout.group_size)
        grad_offsets = grad_offsets.to(offsets.dtype)
    return grad_x, (None, None, grad_scales, grad_offsets)


linear.register_autograd(linear_backward, setup_context=_save)

# int group: w = scale * q + offset ---------------------------------------------------------------


@Operation
def int_group_grad_statistics(
    grad: Tensor, x: Tensor, weight: Weight, units: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return d scales and d offsets, float32 [out_features, groups], of one product dyᵀ x.

    Group sums of (dyᵀ x) * q, q the weight's codes, and of dyᵀ x; both times units
    [out_features, groups], if given.
    """
    compute = implementation("int_group_grad_statistics", x.device)
    out: tuple[Tensor, Tensor] = compute(grad, x, weight, units)
    return out


@int_group_grad_statistics.register_fake
def _(grad: Tensor, x: Tensor, weight: Weight, units: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = weight.layout.out_features, -(-x.shape[-1] // weight.layout.group_size)
    scales, offsets = (x.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return scales, offsets


@Operation
def int_group_grad_offsets(grad: Tensor, x: Tensor, group_size: int) -> Tensor:
    """Return d offsets alone, float32 [out_features, groups]: dyᵀ groupsum(x)."""
    out: Tensor = implementation("int_group_grad_offsets", x.device)(grad, x, group_size)
    return out


@int_group_grad_offsets.register_fake
def _(grad: Tensor, x: Tensor, group_size: int) -> Tensor:
    groups = -(-x.shape[-1] // group_size)
    return x.new_empty((grad.shape[-1], groups), dtype=torch.float32)


@Operation
def int_group_quantize(
    weight: Tensor, bits: int, group_size: int, statistics: torch.dtype, smallest_scale: float
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return (planes, scales, offsets) of a weight, rounded to nearest in each group.

    Where the weight or its statistics are not finite, so is at least one of the scales and offsets.
    """
    compute = implementation("int_group_quantize", weight.device)
    out: tuple[list[Tensor], Tensor, Tensor]
    out = compute(weight, bits, group_size, statistics, smallest_scale)
    return out


@int_group_quantize.register_fake
def _(
    weight: Tensor, bits: int, group_size: int, statistics: torch.dtype, smallest_scale: float
) -> tuple[list[Tensor], Tensor, Tensor]:
    rows, columns = weight.shape
    shape = rows, -(-columns // group_size)
    scales, offsets = (weight.new_empty(shape, dtype=statistics) for _ in range(2))
    return empty_planes(weight, bits), scales, offsets


# codebook (nf4, fp4): w = codebook[code] * absmax ------------------------------------------------


@Operation
def codebook_quantize(weight: Tensor, codebook: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Return (codes uint8 [ceil(n/2)], absmax float32 [ceil(n/block_size)]) of a weight."""
    out: tuple[Tensor, Tensor] = implementation("codebook_quantize", weight.device)(
        weight, codebook, block_size
    )
    return out


@codebook_quantize.register_fake
def _(weight: Tensor, codebook: str, block_size: int) -> tuple[Tensor, Tensor]:
    count = weight.numel()
    codes = weight.new_empty((-(-count // 2),), dtype=torch.uint8)
    return codes, weight.new_empty((-(-count // block_size),), dtype=torch.float32)


@Operation
def codebook_quantize_absmax(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes uint8 [n], scales float32 [ceil(n/256)]) of absmax [n] - offset [1].

    Double quantisation (QLoRA, arXiv 2305.14314, section 3): 8-bit dynamic codes in blocks of 256.
    """
    compute = implementation("codebook_quantize_absmax", absmax.device)
    out: tuple[Tensor, Tensor] = compute(absmax, offset)
    return out


@codebook_quantize_absmax.register_fake
def _(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    scales = absmax.new_empty((-(-absmax.numel() // NESTED_BLOCK_SIZE),))
    return absmax.new_empty(absmax.shape, dtype=torch.uint8), scales
