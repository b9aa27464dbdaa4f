"""Frozen weights by the native kernels, which read the packed layout as it lies on disk."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.kernels.backend.native_library import (
    COMPUTE,
    DTYPES,
    address,
    call,
    library,
    native,
    plane_addresses,
    prepared,
)
from graft.kernels.frozen import reference
from graft.kernels.packed.codebooks import dynamic_code_table, quantisation_bounds
from graft.kernels.packed.planes import empty_planes
from graft.kernels.packed.weight import NESTED_BLOCK_SIZE, Weight

FEW_TOKENS = 16
"""Up to so many tokens meet a weight's numbers as they lie (csrc/code_products.inc)."""


def token_count(x: Tensor) -> int:
    """Return the number of rows of x [..., features]."""
    return x.numel() // x.shape[-1] if x.shape[-1] else 0


def reads(x: Tensor, weight: Weight) -> bool:
    """Return whether the kernels multiply x with this weight as it is."""
    first = weight.tensors[0]
    return x.dtype in COMPUTE and (weight.layout.kind != "dense" or _is_read(first, x.dtype))


def _is_read(dense: Tensor | None, dtype: torch.dtype) -> bool:
    """Return whether a dense weight is read beside inputs of that dtype; bfloat16 is widened."""
    return dense is not None and dense.dtype in (dtype, torch.bfloat16)


def as_inputs(weight: Weight, dtype: torch.dtype, few: bool = False) -> Weight:
    """Return the weight as it is multiplied with inputs of that dtype: a dense one converted.

    `few` tokens meet a dense weight as it lies.
    """
    first = weight.tensors[0]
    if weight.layout.kind != "dense" or first is None or _is_read(first, dtype):
        return weight
    if few and first.dtype in COMPUTE:
        return weight
    return Weight(weight.layout, (first.to(dtype),))


def check_width(x: Tensor, features: int) -> None:
    """Raise ValueError where the kernels would read past the end of x."""
    if x.shape[-1] != features:
        raise ValueError(f"the last dimension of {tuple(x.shape)} is not the weight's {features}")


# A weight of any kind ----------------------------------------------------------------------------


def _product(name: str, x: Tensor, weight: Weight, features: int, columns: int) -> Tensor:
    check_width(x, features)
    matrix = x.contiguous()
    out = x.new_empty((*x.shape[:-1], columns))
    if not x.numel():
        return out
    tokens = token_count(x)
    few = name == "linear" and tokens <= FEW_TOKENS
    struct = prepared(as_inputs(weight, x.dtype, few))
    sizes = DTYPES[x.dtype], address(matrix), tokens
    call(name, struct.reference, None, *sizes, address(out), None)
    return out


@native.implements("linear")
def linear(x: Tensor, weight: Weight) -> Tensor:
    """Compute y = x Wᵀ."""
    if x.dtype not in COMPUTE:
        return reference.linear(x, weight)
    layout = weight.layout
    return _product("linear", x, weight, layout.in_features, layout.out_features)


@native.implements("grad_input")
def grad_input(grad: Tensor, weight: Weight) -> Tensor:
    """Compute dx = dy W."""
    if grad.dtype not in COMPUTE:
        return reference.grad_input(grad, weight)
    layout = weight.layout
    return _product("grad_input", grad, weight, layout.out_features, layout.in_features)


@native.implements("dequantize")
def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Compute the weight in float32 and round once to `dtype`."""
    layout, first = weight.layout, weight.tensors[0]
    if layout.kind == "dense" or first is None:
        return reference.dequantize(weight, dtype)
    kernel_dtype = dtype if dtype in COMPUTE else torch.float32
    out = first.new_empty((layout.out_features, layout.in_features), dtype=kernel_dtype)
    call("dequantize", prepared(weight).reference, DTYPES[kernel_dtype], address(out))
    return out.to(dtype)


# int group: w = scale * q + offset ---------------------------------------------------------------


@native.implements("int_group_grad_statistics")
def int_group_grad_statistics(
    grad: Tensor, x: Tensor, weight: Weight, units: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute the group sums of (dyᵀ x) * q and of dyᵀ x, never holding dyᵀ x; float32."""
    if x.dtype not in COMPUTE:
        return reference.int_group_grad_statistics(grad, x, weight, units)
    return grad_statistics(grad, x, weight, units, rounds=False)


def grad_statistics(
    grad: Tensor, x: Tensor, weight: Weight, units: Tensor | None, rounds: bool
) -> tuple[Tensor, Tensor]:
    """Compute `int_group_grad_statistics` of a dtype in COMPUTE.

    rounds: where AVX2 or AVX-512 multiplies integers faster than floats, dy and x are rounded to 7
    bits first (csrc/rounded_statistics.inc).
    """
    dy, inputs, layout = grad.contiguous(), x.contiguous(), weight.layout
    check_width(x, layout.in_features)
    shape = layout.out_features, -(-layout.in_features // layout.group_size)
    if not x.numel():
        return x.new_zeros(shape, dtype=torch.float32), x.new_zeros(shape, dtype=torch.float32)
    scales, offsets = (x.new_empty(shape, dtype=torch.float32) for _ in range(2))
    struct = prepared(weight.moved(units, None))
    sizes = DTYPES[x.dtype], address(dy), address(inputs), token_count(x), rounds
    call("grad_statistics", struct.reference, *sizes, address(scales), address(offsets))
    return scales, offsets


@native.implements("int_group_quantize")
def int_group_quantize(
    weight: Tensor, bits: int, group_size: int, statistics: torch.dtype, smallest_scale: float
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Round to nearest between each group's minimum and maximum."""
    if weight.dtype not in COMPUTE:
        weight = weight.float()
    matrix = weight.contiguous()
    rows, columns = matrix.shape
    planes = empty_planes(matrix, bits)
    shape = rows, -(-columns // group_size)
    scales, offsets = (matrix.new_empty(shape, dtype=statistics) for _ in range(2))
    status = library().graft_int_group_quantize(
        DTYPES[matrix.dtype],
        address(matrix),
        *(rows, columns, bits, group_size),
        DTYPES[statistics],
        smallest_scale,
        *plane_addresses(planes),
        *(address(scales), address(offsets)),
        torch.get_num_threads(),
    )
    if status < 0:
        raise MemoryError("graft's native kernel int_group_quantize found no memory")
    if status > 0:
        scales.fill_(float("nan"))
    return planes, scales, offsets


# codebook: w = codebook[code] * absmax -----------------------------------------------------------


@native.implements("codebook_quantize")
def codebook_quantize(weight: Tensor, codebook: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantise the flattened weight block by block to the nearest codebook value."""
    if weight.dtype not in COMPUTE or block_size % 2 or block_size > 511:
        return reference.codebook_quantize(weight, codebook, block_size)
    flat = weight.contiguous()
    count = flat.numel()
    codes = flat.new_empty((-(-count // 2),), dtype=torch.uint8)
    absmax = flat.new_empty((-(-count // block_size),), dtype=torch.float32)
    bounds, code_of_rank = quantisation_bounds(codebook)
    source = DTYPES[flat.dtype], address(flat), count, block_size
    call(
        "codebook_quantize",
        *source,
        address(bounds),
        address(code_of_rank),
        address(codes),
        address(absmax),
    )
    return codes, absmax


@native.implements("codebook_quantize_absmax")
def codebook_quantize_absmax(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Round absmax - offset to 8-bit dynamic codes in blocks of 256."""
    values, table = absmax.contiguous(), dynamic_code_table()
    codes = values.new_empty(values.shape, dtype=torch.uint8)
    scales = values.new_empty((-(-values.numel() // NESTED_BLOCK_SIZE),))
    where = address(values), values.numel(), offset.item(), address(table)
    call("absmax_quantize", *where, address(codes), address(scales))
    return codes, scales
