"""The native CPU backend: C++ kernels (csrc/) that read the packed layout as it lies on disk.

The library is plain C and is reached through ctypes, which lets go of the interpreter while a
kernel runs. Its threads are those of the OpenMP runtime that PyTorch has loaded, so that the two
do not fight for the cores.

Products are in bfloat16 (summed in float32) or in float32; other dtypes go to the reference.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from graft.kernels.backend.native_library import (
    COMPUTE,
    DTYPES,
    address,
    call,
    descriptor,
    library,
    why_unavailable,
)
from graft.kernels.backend.registry import Backend, register_backend
from graft.kernels.frozen import reference
from graft.kernels.packed.codebooks import dynamic_code_table, quantisation_bounds
from graft.kernels.packed.planes import empty_planes
from graft.kernels.packed.weight import NESTED_BLOCK_SIZE, Layout, Weight

native = register_backend(
    Backend(
        name="native",
        priority=10,
        device_types=frozenset({"cpu"}),
        why_unavailable=why_unavailable,
    )
)


def token_count(x: Tensor) -> int:
    """Return the number of rows of x [..., features]."""
    return x.numel() // x.shape[-1] if x.shape[-1] else 0


def _product(name: str, x: Tensor, weight: Weight, columns: int) -> Tensor:
    matrix = x.contiguous()
    out = x.new_empty((*x.shape[:-1], columns))
    if not x.numel():
        return out
    struct, alive = descriptor(weight)
    where = ctypes.byref(struct)
    call(name, where, None, DTYPES[x.dtype], address(matrix), token_count(x), address(out), None)
    del alive
    return out


def reads(x: Tensor, weight: Weight) -> bool:
    """Return whether the kernels multiply x with this weight."""
    first = weight.tensors[0]
    readable = weight.layout.kind != "dense" or (first is not None and first.dtype == x.dtype)
    return x.dtype in COMPUTE and readable


# Frozen weights ----------------------------------------------------------------------------------


def _int_group(
    codes: Tensor,
    codes_high: Tensor | None,
    scales: Tensor | None,
    offsets: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Weight:
    layout = Layout("int_group", codes.shape[0], in_features, bits, group_size)
    return Weight(layout, (codes, codes_high, scales, offsets))


def _dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    first = weight.tensors[0]
    assert first is not None
    shape = weight.layout.out_features, weight.layout.in_features
    kernel_dtype = dtype if dtype in COMPUTE else torch.float32
    out = torch.empty(shape, dtype=kernel_dtype, device=first.device)
    struct, alive = descriptor(weight)
    call("dequantize", ctypes.byref(struct), DTYPES[kernel_dtype], address(out))
    del alive
    return out.to(dtype)


@native.implements("int_group_dequantize")
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
    """Compute w = scale * q + offset in float32 and round once to `dtype`."""
    weight = _int_group(codes, codes_high, scales, offsets, bits, group_size, in_features)
    return _dequantize(weight, dtype)


@native.implements("int_group_linear")
def int_group_linear(
    x: Tensor,
    codes: Tensor,
    codes_high: Tensor | None,
    scales: Tensor,
    offsets: Tensor,
    bits: int,
    group_size: int,
) -> Tensor:
    """Compute y = x Wᵀ."""
    packed = codes, codes_high, scales, offsets
    if x.dtype not in COMPUTE:
        return reference.int_group_linear(x, *packed, bits, group_size)
    weight = _int_group(*packed, bits, group_size, x.shape[-1])
    return _product("linear", x, weight, codes.shape[0])


@native.implements("int_group_grad_input")
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
    """Compute dx = dy W."""
    packed = codes, codes_high, scales, offsets
    if grad.dtype not in COMPUTE:
        return reference.int_group_grad_input(grad, *packed, bits, group_size, in_features)
    weight = _int_group(*packed, bits, group_size, in_features)
    return _product("grad_input", grad, weight, in_features)


@native.implements("int_group_grad_statistics")
def int_group_grad_statistics(
    grad: Tensor,
    x: Tensor,
    codes: Tensor,
    codes_high: Tensor | None,
    bits: int,
    group_size: int,
    units: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute the group sums of (dyᵀ x) * q and of dyᵀ x, never holding dyᵀ x; float32."""
    packed = codes, codes_high, bits, group_size
    if x.dtype not in COMPUTE:
        return reference.int_group_grad_statistics(grad, x, *packed, units)
    dy, inputs = grad.contiguous(), x.contiguous()
    weight = _int_group(codes, codes_high, units, None, bits, group_size, x.shape[-1])
    groups = -(-x.shape[-1] // group_size)
    shape = codes.shape[0], groups
    if not x.numel():
        return x.new_zeros(shape, dtype=torch.float32), x.new_zeros(shape, dtype=torch.float32)
    scales, offsets = (x.new_empty(shape, dtype=torch.float32) for _ in range(2))
    struct, alive = descriptor(weight)
    where = ctypes.byref(struct), DTYPES[x.dtype], address(dy), address(inputs), token_count(x)
    call("grad_statistics", *where, address(scales), address(offsets))
    del alive
    return scales, offsets


@native.implements("int_group_quantize")
def int_group_quantize(
    weight: Tensor, bits: int, group_size: int, statistics: torch.dtype, smallest_scale: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Round to nearest between each group's minimum and maximum."""
    if weight.dtype not in COMPUTE:
        weight = weight.float()
    matrix = weight.contiguous()
    rows, columns = matrix.shape
    codes, codes_high = empty_planes(matrix, bits)
    shape = rows, -(-columns // group_size)
    scales, offsets = (matrix.new_empty(shape, dtype=statistics) for _ in range(2))
    status = library().graft_int_group_quantize(
        DTYPES[matrix.dtype],
        address(matrix),
        *(rows, columns, bits, group_size),
        DTYPES[statistics],
        smallest_scale,
        *(address(codes), address(codes_high), address(scales), address(offsets)),
        torch.get_num_threads(),
    )
    if status < 0:
        raise MemoryError("graft's native kernel int_group_quantize found no memory")
    if status > 0:
        scales.fill_(float("nan"))
    return codes, codes_high, scales, offsets


def _codebook(
    codes: Tensor,
    absmax: Tensor,
    codebook: str,
    block_size: int,
    shape: tuple[int, int],
    nested: tuple[Tensor | None, Tensor | None],
) -> Weight:
    layout = Layout("codebook", *shape, 4, block_size, codebook)
    return Weight(layout, (codes, absmax, *nested))


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


@native.implements("codebook_dequantize")
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
    """Compute w = codebook[code] * absmax of its block in float32 and round once to `dtype`."""
    shape, nested = (out_features, in_features), (absmax_scale, absmax_offset)
    return _dequantize(_codebook(codes, absmax, codebook, block_size, shape, nested), dtype)


@native.implements("codebook_linear")
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
    """Compute y = x Wᵀ."""
    arguments, nested = (codes, absmax, codebook, block_size), (absmax_scale, absmax_offset)
    if x.dtype not in COMPUTE:
        return reference.codebook_linear(x, *arguments, out_features, *nested)
    weight = _codebook(*arguments, (out_features, x.shape[-1]), nested)
    return _product("linear", x, weight, out_features)


@native.implements("codebook_grad_input")
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
    """Compute dx = dy W."""
    arguments, nested = (codes, absmax, codebook, block_size), (absmax_scale, absmax_offset)
    if grad.dtype not in COMPUTE:
        return reference.codebook_grad_input(grad, *arguments, in_features, *nested)
    weight = _codebook(*arguments, (grad.shape[-1], in_features), nested)
    return _product("grad_input", grad, weight, in_features)


@native.implements("dense_linear")
def dense_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Compute y = x Wᵀ."""
    dense = Weight(Layout("dense", *weight.shape), (weight,))
    if not reads(x, dense):
        return reference.dense_linear(x, weight)
    return _product("linear", x, dense, weight.shape[0])


@native.implements("dense_grad_input")
def dense_grad_input(grad: Tensor, weight: Tensor) -> Tensor:
    """Compute dx = dy W."""
    dense = Weight(Layout("dense", *weight.shape), (weight,))
    if not reads(grad, dense):
        return reference.dense_grad_input(grad, weight)
    return _product("grad_input", grad, dense, weight.shape[1])


@native.implements("int8_linear")
def int8_linear(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Compute y = x Wᵀ with w = scale[row] * code."""
    if x.dtype not in COMPUTE:
        return reference.int8_linear(x, codes, scales)
    weight = Weight(Layout("int8", *codes.shape), (codes, scales))
    return _product("linear", x, weight, codes.shape[0])


@native.implements("int8_grad_input")
def int8_grad_input(grad: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Compute dx = dy W."""
    if grad.dtype not in COMPUTE:
        return reference.int8_grad_input(grad, codes, scales)
    weight = Weight(Layout("int8", *codes.shape), (codes, scales))
    return _product("grad_input", grad, weight, codes.shape[1])
