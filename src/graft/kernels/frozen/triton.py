"""The Triton backend: CUDA kernels that read the packed layout as it lies on disk.

A product with few tokens (decoding) is fused: codes are dequantised in registers, rounded to x's
dtype as the reference rounds them, and summed in float32. With more tokens, and backwards, the
weight is dequantised into memory and multiplied by cuBLAS, which is at the machine's limit there.
Nothing is summed with atomics, so two runs give the same bits.

int_group_grad_offsets alone is left to the reference backend: a pooling of x, and a product
group_size times smaller than the layer's.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graft.kernels.backend.triton_launch import DTYPES, as_matrix, as_stored, launch, tiles, triton
from graft.kernels.frozen import reference
from graft.kernels.packed.codebooks import codebook as codebook_values
from graft.kernels.packed.codebooks import dynamic_code, quantisation_bounds
from graft.kernels.packed.planes import BLOCK, PLANES
from graft.kernels.packed.weight import NESTED_BLOCK_SIZE, Layout, Weight

_FUSED_TOKENS = 16
"""A product with at most so many tokens is fused: one tile of the tensor cores."""
_FUSED_ROWS = 32
_VECTOR_TOKENS = 0
"""A product with at most so many tokens, 1 or 0, is summed along the rows instead, in one launch
where tiles take three. It is 0 until a GPU has shown that 1 is quicker."""
_VECTOR_ROWS = 4


def _is_fused(x: Tensor) -> bool:
    return x.dtype in DTYPES and 0 < x.numel() // x.shape[-1] <= _FUSED_TOKENS


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _fused_linear(
    kernel: str,
    x: Tensor,
    packed: tuple[Tensor | None, ...],
    sizes: tuple[int, ...],
    steps: int,
    **constants: int,
) -> Tensor:
    """Launch a linear kernel that takes `steps` tiles along each row; sizes[0] is out_features.

    Where the rows alone do not fill the GPU, a row's tiles are shared out in splits. Each split
    writes its own float32 part, and the parts are summed in a fixed order.
    """
    matrix, out_features = as_matrix(x), sizes[0]
    row_tiles = tiles(out_features, _FUSED_ROWS)
    steps_each = tiles(steps, max(1, 2 * _processors(x.device) // row_tiles))
    splits = tiles(steps, steps_each)
    dtype = x.dtype if splits == 1 else torch.float32
    out = x.new_empty((splits, matrix.shape[0], out_features), dtype=dtype)
    constants |= {"TOKENS": _FUSED_TOKENS, "ROWS": _FUSED_ROWS}
    sizes = (matrix.shape[0], *sizes, steps_each)
    launch(kernel, (row_tiles, splits), out, matrix, *packed, *sizes, **constants)
    summed = out[0] if splits == 1 else out.sum(0).to(x.dtype)
    return summed.view(*x.shape[:-1], out_features)


def _vector_linear(
    kernel: str,
    x: Tensor,
    packed: tuple[Tensor | None, ...],
    sizes: tuple[int, ...],
    **constants: int,
) -> Tensor:
    """Launch a linear kernel of one token; sizes[0] is out_features."""
    out = x.new_empty((*x.shape[:-1], sizes[0]))
    constants |= {"ROWS": _VECTOR_ROWS}
    grid = (tiles(sizes[0], _VECTOR_ROWS),)
    launch(kernel, grid, out, as_matrix(x), *packed, *sizes, **constants)
    return out


def _is_vector(x: Tensor) -> bool:
    return x.numel() // x.shape[-1] <= _VECTOR_TOKENS


# A weight of any kind ----------------------------------------------------------------------------


@triton.implements("dequantize")
def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Compute the weight in float32 and round once to `dtype`."""
    compute = _DEQUANTIZE.get(weight.layout.kind, reference.dequantize)
    return compute(weight, dtype)


@triton.implements("linear")
def linear(x: Tensor, weight: Weight) -> Tensor:
    """Compute y = x Wᵀ, fused for few tokens."""
    fused = _FUSED.get(weight.layout.kind)
    if fused is None:
        return reference.linear(x, weight)
    if not _is_fused(x) or weight.layout.in_features % _whole_columns(weight):
        return functional.linear(x, dequantize(weight, x.dtype))
    return fused(x, weight)


@triton.implements("grad_input")
def grad_input(grad: Tensor, weight: Weight) -> Tensor:
    """Compute dx = dy W."""
    if weight.layout.kind not in _DEQUANTIZE:
        return reference.grad_input(grad, weight)
    return grad @ dequantize(weight, grad.dtype)


def _whole_columns(weight: Weight) -> int:
    """Return how many columns a fused product takes at once: a block must not straddle two rows."""
    return weight.layout.group_size if weight.layout.kind == "codebook" else 1


# int group: w = scale * q + offset ---------------------------------------------------------------


def _sizes(layout: Layout) -> tuple[tuple[int, int, int, int], dict[str, int]]:
    """Return (out_features, in_features, groups, blocks) and the kernels' constants."""
    columns, group_size, bits = layout.in_features, layout.group_size, layout.bits
    sizes = layout.out_features, columns, tiles(columns, group_size), tiles(columns, BLOCK)
    return sizes, {"BITS": bits, "PLANE": PLANES[bits][0], "GROUP": group_size}


def _dequantize_int_group(weight: Weight, dtype: torch.dtype) -> Tensor:
    packed, (sizes, constants) = as_stored(*weight.tensors), _sizes(weight.layout)
    assert packed[0] is not None
    out = packed[0].new_empty(sizes[:2], dtype=dtype)
    constants |= {"ROWS": 4, "BLOCKS": 32}
    grid = tiles(sizes[0], 4), tiles(sizes[3], 32)
    launch("int_group_dequantize", grid, out, *packed, *sizes, **constants)
    return out


def _int_group_linear(x: Tensor, weight: Weight) -> Tensor:
    sizes, constants = _sizes(weight.layout)
    # float32 needs registers for its operands, and a product at least 16 columns of each part.
    tile = max(1, 4 // constants["PLANE"]) if x.dtype == torch.float32 else 8
    packed, steps = as_stored(*weight.tensors), tiles(sizes[3], tile)
    if _is_vector(x):
        return _vector_linear("int_group_vector", x, packed, sizes, BLOCKS=16, **constants)
    return _fused_linear("int_group_linear", x, packed, sizes, steps, BLOCKS=tile, **constants)


@triton.implements("int_group_grad_statistics")
def int_group_grad_statistics(
    grad: Tensor, x: Tensor, weight: Weight, units: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute d scale[o, g] = sum over j in g of (dyᵀ x)[o, j] * q[o, j], and d offset; float32.

    The offsets' are the same sums without q. The product [out_features, in_features] stays in
    registers, a tile at a time, in float32.
    """
    if x.dtype not in DTYPES:
        return reference.int_group_grad_statistics(grad, x, weight, units)
    sizes, constants = _sizes(weight.layout)
    shape = sizes[0], sizes[2]
    grad_scales, grad_offsets = (x.new_empty(shape, dtype=torch.float32) for _ in range(2))
    grad, x = as_matrix(grad), as_matrix(x)
    rows, tokens = (64, 16) if x.dtype == torch.float32 else (128, 32)
    constants |= {"ROWS": rows, "COLUMNS": 128, "TOKENS": tokens, "num_warps": 8}
    packed = as_stored(*weight.tensors[:2], units)
    arguments = grad_offsets, grad, x, *packed, x.shape[0], *sizes
    grid = tiles(sizes[0], rows), tiles(sizes[1], 128)
    launch("int_group_grad_statistics", grid, grad_scales, *arguments, **constants)
    return grad_scales, grad_offsets


# codebook: w = codebook[code] * absmax -----------------------------------------------------------


@cache
def _values(name: str, device: torch.device) -> Tensor:
    return codebook_values(name).to(device)


@cache
def _dynamic_code(device: torch.device) -> Tensor:
    return dynamic_code().to(device)


@cache
def _bounds(name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    bounds, code_of_rank = quantisation_bounds(name)
    return bounds.to(device), code_of_rank.to(device)


def _check_block_size(block_size: int) -> None:
    if block_size < 2 or block_size & (block_size - 1):
        raise ValueError(f"block_size is {block_size}; the Triton kernels need a power of two")


@triton.implements("codebook_quantize")
def codebook_quantize(weight: Tensor, codebook: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantise the flattened weight block by block, to the reference's very codes and absmax."""
    _check_block_size(block_size)
    flat = weight.reshape(-1).contiguous()
    count = flat.numel()
    blocks = tiles(count, block_size)
    codes = flat.new_empty((tiles(count, 2),), dtype=torch.uint8)
    absmax = flat.new_empty((blocks,), dtype=torch.float32)
    arguments = absmax, flat, *_bounds(codebook, flat.device), count, codes.numel()
    constants = {"BLOCK": block_size, "BLOCKS": 32}
    launch("codebook_quantize", (tiles(blocks, 32),), codes, *arguments, **constants)
    return codes, absmax


def _codebook_operands(weight: Weight) -> tuple[tuple[Any, ...], dict[str, int]]:
    """Return the kernels' tensors, the packed ones among their tables, and their constants."""
    layout, (codes, absmax, *nested) = weight.layout, weight.tensors
    assert codes is not None
    _check_block_size(layout.group_size)
    dynamic = None if nested[0] is None else _dynamic_code(codes.device)
    values = _values(layout.codebook, codes.device)
    packed = as_stored(codes, absmax, dynamic, *nested, values)
    return packed, {"BLOCK": layout.group_size, "NESTED": NESTED_BLOCK_SIZE}


def _dequantize_codebook(weight: Weight, dtype: torch.dtype) -> Tensor:
    packed, constants = _codebook_operands(weight)
    codes, absmax = packed[:2]
    shape = weight.layout.out_features, weight.layout.in_features
    out: Tensor = codes.new_empty(shape, dtype=dtype)
    sizes = out.numel(), codes.numel(), absmax.numel()
    grid = (tiles(sizes[2], 64),)
    launch("codebook_dequantize", grid, out, *packed, *sizes, **constants, BLOCKS=64)
    return out


def _codebook_linear(x: Tensor, weight: Weight) -> Tensor:
    packed, constants = _codebook_operands(weight)
    sizes = weight.layout.out_features, weight.layout.in_features
    if _is_vector(x):
        return _vector_linear("codebook_vector", x, packed, sizes, BLOCKS=16, **constants)
    tile = 1 if x.dtype == torch.float32 else 4
    steps = tiles(sizes[1], tile * constants["BLOCK"])
    return _fused_linear("codebook_linear", x, packed, sizes, steps, **constants, BLOCKS=tile)


# int8: w = scale[row] * code ---------------------------------------------------------------------


def _dequantize_int8(weight: Weight, dtype: torch.dtype) -> Tensor:
    packed, shape = (
        as_stored(*weight.tensors),
        (weight.layout.out_features, weight.layout.in_features),
    )
    assert packed[0] is not None
    out = packed[0].new_empty(shape, dtype=dtype)
    grid = tiles(shape[0], 4), tiles(shape[1], 512)
    launch("int8_dequantize", grid, out, *packed, *shape, ROWS=4, COLUMNS=512)
    return out


def _int8_linear(x: Tensor, weight: Weight) -> Tensor:
    tile = 32 if x.dtype == torch.float32 else 256
    sizes = weight.layout.out_features, weight.layout.in_features
    packed, steps = as_stored(*weight.tensors), tiles(sizes[1], tile)
    return _fused_linear("int8_linear", x, packed, sizes, steps, COLUMNS=tile)


_DEQUANTIZE = {
    "int_group": _dequantize_int_group,
    "codebook": _dequantize_codebook,
    "int8": _dequantize_int8,
}
_FUSED = {"int_group": _int_group_linear, "codebook": _codebook_linear, "int8": _int8_linear}
