"""The Triton backend: CUDA kernels that read the packed layout as it lies on disk.

A product with few tokens (decoding) is fused: codes are dequantised in registers, rounded to x's
dtype as the reference rounds them, and summed in float32. With more tokens, and backwards, the
weight is dequantised into memory and multiplied by cuBLAS, which is at the machine's limit there.
Nothing is summed with atomics, so two runs give the same bits.

int_group_grad_offsets is left to the reference backend: a pooling of x, and a product group_size
times smaller than the layer's.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from graft.kernels.backend.triton_launch import DTYPES, as_matrix, as_stored, launch, tiles, triton
from graft.kernels.frozen import reference
from graft.kernels.packed.codebooks import codebook as codebook_values
from graft.kernels.packed.codebooks import dynamic_code, quantisation_bounds
from graft.kernels.packed.planes import BLOCK, PLANES
from graft.kernels.packed.weight import NESTED_BLOCK_SIZE

_FUSED_TOKENS = 16
"""A product with at most so many tokens is fused: one tile of the tensor cores."""
_FUSED_ROWS = 32


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


# int group: w = scale * q + offset ---------------------------------------------------------------


def _layout(
    codes: Tensor, bits: int, group_size: int, in_features: int
) -> tuple[tuple[int, int, int, int], dict[str, int]]:
    """Return (out_features, in_features, groups, blocks) and the kernels' constants."""
    sizes = codes.shape[0], in_features, tiles(in_features, group_size), tiles(in_features, BLOCK)
    return sizes, {"BITS": bits, "PLANE": PLANES[bits][0], "GROUP": group_size}


@triton.implements("int_group_dequantize")
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
    sizes, constants = _layout(codes, bits, group_size, in_features)
    out = codes.new_empty(sizes[:2], dtype=dtype)
    packed = as_stored(codes, codes_high, scales, offsets)
    constants |= {"ROWS": 4, "BLOCKS": 32}
    grid = tiles(sizes[0], 4), tiles(sizes[3], 32)
    launch("int_group_dequantize", grid, out, *packed, *sizes, **constants)
    return out


@triton.implements("int_group_linear")
def int_group_linear(
    x: Tensor,
    codes: Tensor,
    codes_high: Tensor | None,
    scales: Tensor,
    offsets: Tensor,
    bits: int,
    group_size: int,
) -> Tensor:
    """Compute y = x Wᵀ, fused for few tokens."""
    if not _is_fused(x):
        weight = int_group_dequantize(
            codes, codes_high, scales, offsets, bits, group_size, x.shape[-1], x.dtype
        )
        return functional.linear(x, weight)
    sizes, constants = _layout(codes, bits, group_size, x.shape[-1])
    packed = as_stored(codes, codes_high, scales, offsets)
    # float32 needs registers for its operands, and a product at least 16 columns of each part.
    tile = max(1, 4 // constants["PLANE"]) if x.dtype == torch.float32 else 8
    steps = tiles(sizes[3], tile)
    return _fused_linear("int_group_linear", x, packed, sizes, steps, BLOCKS=tile, **constants)


@triton.implements("int_group_grad_input")
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
    weight: Tensor = int_group_dequantize(
        codes, codes_high, scales, offsets, bits, group_size, in_features, grad.dtype
    )
    return grad @ weight


@triton.implements("int_group_grad_statistics")
def int_group_grad_statistics(
    grad: Tensor,
    x: Tensor,
    codes: Tensor,
    codes_high: Tensor | None,
    bits: int,
    group_size: int,
    units: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute d scale[o, g] = sum over j in g of (dyᵀ x)[o, j] * q[o, j], and d offset; float32.

    The product [out_features, in_features] stays in registers, a tile at a time, in float32.
    """
    if x.dtype not in DTYPES:
        packed = codes, codes_high, bits, group_size, units
        both: tuple[Tensor, Tensor] = reference.int_group_grad_statistics(grad, x, *packed)
        return both
    grad_offsets = reference.int_group_grad_offsets(grad, x, group_size)
    sizes, constants = _layout(codes, bits, group_size, x.shape[-1])
    grad_scales = x.new_empty((sizes[0], sizes[2]), dtype=torch.float32)
    grad, x = as_matrix(grad), as_matrix(x)
    rows, tokens = (64, 16) if x.dtype == torch.float32 else (128, 32)
    constants |= {"ROWS": rows, "COLUMNS": 128, "TOKENS": tokens, "num_warps": 8}
    arguments = grad, x, *as_stored(codes, codes_high), x.shape[0], *sizes
    grid = tiles(sizes[0], rows), tiles(sizes[1], 128)
    launch("int_group_grad_scales", grid, grad_scales, *arguments, **constants)
    if units is None:
        return grad_scales, grad_offsets
    return grad_scales * units, grad_offsets * units


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


def _packed_codebook(
    codes: Tensor,
    absmax: Tensor,
    codebook: str,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Return the kernels' arguments of a packed weight: its tensors among their tables."""
    dynamic = None if absmax_scale is None else _dynamic_code(codes.device)
    nested = dynamic, absmax_scale, absmax_offset
    return as_stored(codes, absmax, *nested, _values(codebook, codes.device))


@triton.implements("codebook_dequantize")
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
    _check_block_size(block_size)
    out = codes.new_empty((out_features, in_features), dtype=dtype)
    packed = _packed_codebook(codes, absmax, codebook, absmax_scale, absmax_offset)
    sizes = out.numel(), codes.numel(), absmax.numel()
    constants = {"BLOCK": block_size, "NESTED": NESTED_BLOCK_SIZE, "BLOCKS": 64}
    launch("codebook_dequantize", (tiles(sizes[2], 64),), out, *packed, *sizes, **constants)
    return out


@triton.implements("codebook_linear")
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
    """Compute y = x Wᵀ, fused for few tokens when no block straddles two rows."""
    sizes, nested = (out_features, x.shape[-1]), (absmax_scale, absmax_offset)
    if sizes[1] % block_size or not _is_fused(x):
        weight = codebook_dequantize(codes, absmax, codebook, block_size, *sizes, x.dtype, *nested)
        return functional.linear(x, weight)
    _check_block_size(block_size)
    packed = _packed_codebook(codes, absmax, codebook, *nested)
    tile = 1 if x.dtype == torch.float32 else 4
    constants = {"BLOCK": block_size, "NESTED": NESTED_BLOCK_SIZE, "BLOCKS": tile}
    steps = tiles(sizes[1], tile * block_size)
    return _fused_linear("codebook_linear", x, packed, sizes, steps, **constants)


@triton.implements("codebook_grad_input")
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
    shape, nested = (grad.shape[-1], in_features), (absmax_scale, absmax_offset)
    weight: Tensor = codebook_dequantize(
        codes, absmax, codebook, block_size, *shape, grad.dtype, *nested
    )
    return grad @ weight


# int8: w = scale[row] * code ---------------------------------------------------------------------


def _int8_weight(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute w = scale[row] * code in float32 and round once to `dtype`."""
    out = codes.new_empty(codes.shape, dtype=dtype)
    grid = tiles(codes.shape[0], 4), tiles(codes.shape[1], 512)
    arguments = *as_stored(codes, scales), *codes.shape
    launch("int8_dequantize", grid, out, *arguments, ROWS=4, COLUMNS=512)
    return out


@triton.implements("int8_linear")
def int8_linear(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Compute y = x Wᵀ with w = scale[row] * code, fused for few tokens."""
    if not _is_fused(x):
        return functional.linear(x, _int8_weight(codes, scales, x.dtype))
    tile = 32 if x.dtype == torch.float32 else 256
    steps = tiles(codes.shape[1], tile)
    packed = as_stored(codes, scales)
    return _fused_linear("int8_linear", x, packed, tuple(codes.shape), steps, COLUMNS=tile)


@triton.implements("int8_grad_input")
def int8_grad_input(grad: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Compute dx = dy W."""
    return grad @ _int8_weight(codes, scales, grad.dtype)
