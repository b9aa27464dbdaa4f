"""The operations: schema, fake kernel and gradient of each, declared once for every backend.

Shapes: x [..., in_features], grad (dy) [..., out_features], weights [out_features, in_features].
Packed tensors are those of `graft.formats`; statistics may be fp16 or float32 and are read as
float32. Only x, scales and offsets are differentiable: codes are frozen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import graft.kernels.backends  # noqa: F401  (registers them)
from graft.kernels.backend.operation import Operation
from graft.kernels.backend.registry import implementation
from graft.kernels.packed.planes import PLANES, plane_bytes
from graft.kernels.packed.weight import NESTED_BLOCK_SIZE

# int group: w = scale * q + offset ---------------------------------------------------------------


@Operation
def int_group_dequantize(
    codes: Tensor,
    codes_high: Tensor | None,
    scales: Tensor,
    offsets: Tensor,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weight `scale * q + offset`, [out_features, in_features] in `dtype`."""
    compute = implementation("int_group_dequantize", codes.device)
    out: Tensor = compute(codes, codes_high, scales, offsets, bits, group_size, in_features, dtype)
    return out


@int_group_dequantize.register_fake
def _(
    codes: Tensor,
    codes_high: Tensor | None,
    scales: Tensor,
    offsets: Tensor,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty((codes.shape[0], in_features), dtype=dtype)


@Operation
def int_group_linear(
    x: Tensor,
    codes: Tensor,
    codes_high: Tensor | None,
    scales: Tensor,
    offsets: Tensor,
    bits: int,
    group_size: int,
) -> Tensor:
    """Return y = x Wᵀ; differentiable in x, scales and offsets."""
    compute = implementation("int_group_linear", x.device)
    out: Tensor = compute(x, codes, codes_high, scales, offsets, bits, group_size)
    return out


@int_group_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    codes_high: Tensor | None,
    scales: Tensor,
    offsets: Tensor,
    bits: int,
    group_size: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@Operation
def int_group_grad_input(
    grad: Tensor,
    codes: Tensor,
    codes_high: Tensor | None,
    scales: Tensor,
    offsets: Tensor,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """Return dx = dy W."""
    compute = implementation("int_group_grad_input", grad.device)
    out: Tensor = compute(grad, codes, codes_high, scales, offsets, bits, group_size, in_features)
    return out


@int_group_grad_input.register_fake
def _(
    grad: Tensor,
    codes: Tensor,
    codes_high: Tensor | None,
    scales: Tensor,
    offsets: Tensor,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


@Operation
def int_group_grad_statistics(
    grad: Tensor,
    x: Tensor,
    codes: Tensor,
    codes_high: Tensor | None,
    bits: int,
    group_size: int,
    units: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return d scales and d offsets, float32 [out_features, groups], of one product dyᵀ x.

    Group sums of (dyᵀ x) * q, and of dyᵀ x; both times units [out_features, groups], if given.
    """
    compute = implementation("int_group_grad_statistics", x.device)
    out: tuple[Tensor, Tensor] = compute(grad, x, codes, codes_high, bits, group_size, units)
    return out


@int_group_grad_statistics.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    codes: Tensor,
    codes_high: Tensor | None,
    bits: int,
    group_size: int,
    units: Tensor | None,
) -> tuple[Tensor, Tensor]:
    shape = grad.shape[-1], -(-x.shape[-1] // group_size)
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


def _int_group_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, codes_high, scales, offsets, ctx.bits, ctx.group_size = inputs
    ctx.in_features = x.shape[-1]
    # x is needed for the statistics' gradients alone; a frozen layer does not keep it alive.
    statistics_train = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    ctx.save_for_backward(x if statistics_train else None, codes, codes_high, scales, offsets)


def _int_group_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, codes, codes_high, scales, offsets = ctx.saved_tensors
    need_x, _, _, need_scales, need_offsets, _, _ = ctx.needs_input_grad
    grad_x = grad_scales = grad_offsets = None
    grad = grad.contiguous()
    if need_x:
        grad_x = int_group_grad_input(
            grad, codes, codes_high, scales, offsets, ctx.bits, ctx.group_size, ctx.in_features
        )
    if need_scales:
        both = int_group_grad_statistics(grad, x, codes, codes_high, ctx.bits, ctx.group_size, None)
        grad_scales = both[0].to(scales.dtype)
        grad_offsets = both[1].to(offsets.dtype) if need_offsets else None
    elif need_offsets:
        grad_offsets = int_group_grad_offsets(grad, x, ctx.group_size).to(offsets.dtype)
    return grad_x, None, None, grad_scales, grad_offsets, None, None


int_group_linear.register_autograd(_int_group_backward, setup_context=_int_group_save)


@Operation
def int_group_quantize(
    weight: Tensor, bits: int, group_size: int, statistics: torch.dtype, smallest_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (codes, codes_high, scales, offsets) of a weight, rounded to nearest in each group.

    codes_high is empty unless bits is 3. Where the weight or its statistics are not finite, so is
    at least one of the scales and offsets.
    """
    compute = implementation("int_group_quantize", weight.device)
    codes, codes_high, scales, offsets = compute(
        weight, bits, group_size, statistics, smallest_scale
    )
    if codes_high is None:
        codes_high = codes.new_empty((codes.shape[0], 0))
    return codes, codes_high, scales, offsets


@int_group_quantize.register_fake
def _(
    weight: Tensor, bits: int, group_size: int, statistics: torch.dtype, smallest_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = weight.shape
    planes = [plane_bytes(plane, columns) for plane in PLANES[bits]]
    low, high = planes[0], planes[1] if len(planes) > 1 else 0
    codes, codes_high = (
        weight.new_empty((rows, width), dtype=torch.uint8) for width in (low, high)
    )
    shape = rows, -(-columns // group_size)
    scales, offsets = (weight.new_empty(shape, dtype=statistics) for _ in range(2))
    return codes, codes_high, scales, offsets


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


@Operation
def codebook_dequantize(
    codes: Tensor,
    absmax: Tensor,
    codebook: str,
    block_size: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    absmax_scale: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """Return the weight `codebook[code] * absmax`, [out_features, in_features] in `dtype`.

    With double quantisation absmax holds codes, and absmax_scale and absmax_offset are given.
    """
    compute = implementation("codebook_dequantize", codes.device)
    shape, nested = (out_features, in_features), (absmax_scale, absmax_offset)
    out: Tensor = compute(codes, absmax, codebook, block_size, *shape, dtype, *nested)
    return out


@codebook_dequantize.register_fake
def _(
    codes: Tensor,
    absmax: Tensor,
    codebook: str,
    block_size: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    absmax_scale: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    return codes.new_empty((out_features, in_features), dtype=dtype)


@Operation
def codebook_linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    codebook: str,
    block_size: int,
    out_features: int,
    absmax_scale: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """Return y = x Wᵀ; differentiable in x."""
    compute = implementation("codebook_linear", x.device)
    nested = absmax_scale, absmax_offset
    out: Tensor = compute(x, codes, absmax, codebook, block_size, out_features, *nested)
    return out


@codebook_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    codebook: str,
    block_size: int,
    out_features: int,
    absmax_scale: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@Operation
def codebook_grad_input(
    grad: Tensor,
    codes: Tensor,
    absmax: Tensor,
    codebook: str,
    block_size: int,
    in_features: int,
    absmax_scale: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """Return dx = dy W."""
    compute = implementation("codebook_grad_input", grad.device)
    nested = absmax_scale, absmax_offset
    out: Tensor = compute(grad, codes, absmax, codebook, block_size, in_features, *nested)
    return out


@codebook_grad_input.register_fake
def _(
    grad: Tensor,
    codes: Tensor,
    absmax: Tensor,
    codebook: str,
    block_size: int,
    in_features: int,
    absmax_scale: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


def _codebook_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, absmax, ctx.codebook, ctx.block_size, _, scale, offset = inputs
    ctx.in_features = x.shape[-1]
    ctx.save_for_backward(codes, absmax, scale, offset)


def _codebook_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, absmax, scale, offset = ctx.saved_tensors
    options = ctx.codebook, ctx.block_size, ctx.in_features
    grad_x = codebook_grad_input(grad.contiguous(), codes, absmax, *options, scale, offset)
    return grad_x, *7 * [None]


codebook_linear.register_autograd(_codebook_backward, setup_context=_codebook_save)
