"""Frozen weights in plain PyTorch: how each kind is read, multiplied with and rounded to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from graft.kernels.backend.reference import reference
from graft.kernels.packed.codebooks import codebook as codebook_values
from graft.kernels.packed.codebooks import dynamic_code_table, quantisation_bounds
from graft.kernels.packed.planes import pack_codes, unpack_codes
from graft.kernels.packed.weight import NESTED_BLOCK_SIZE, Weight, plain_absmax


def _in_groups(matrix: Tensor, group_size: int) -> Tensor:
    """View [rows, columns] as [rows, groups, group_size]; a short last group is filled with 0."""
    short = -matrix.shape[-1] % group_size
    out: Tensor = functional.pad(matrix, (0, short)).unflatten(-1, (-1, group_size))
    return out


# A weight of any kind ----------------------------------------------------------------------------


@reference.implements("dequantize")
def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Compute the weight in float32 and round once to `dtype`."""
    dense = _READERS[weight.layout.kind](weight, dtype)
    return dense.clone() if dense is weight.tensors[0] else dense


@reference.implements("linear")
def linear(x: Tensor, weight: Weight) -> Tensor:
    """Compute y = x Wᵀ with the dequantised weight."""
    return functional.linear(x, _READERS[weight.layout.kind](weight, x.dtype))


@reference.implements("grad_input")
def grad_input(grad: Tensor, weight: Weight) -> Tensor:
    """Compute dx = dy W with the dequantised weight."""
    return grad @ _READERS[weight.layout.kind](weight, grad.dtype)


def _read_dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return the weight itself where it is of that dtype."""
    (dense,) = weight.tensors
    assert dense is not None
    return dense.to(dtype)


def _codes(weight: Weight) -> Tensor:
    """Return an int group weight's codes uint8 [out_features, in_features]."""
    layout = weight.layout
    planes = [plane for plane in weight.tensors[:2] if plane is not None]
    return unpack_codes(planes, layout.bits, layout.in_features)


def _read_int_group(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return w = scale * q + offset."""
    scales, offsets = weight.statistics
    grouped = _in_groups(_codes(weight), weight.layout.group_size).to(torch.float32)
    # code * scale is exact in float32 (8 bits times fp16's 11), so mul_ then add_ rounds once.
    grouped.mul_(scales.unsqueeze(-1).float()).add_(offsets.unsqueeze(-1).float())
    return grouped.flatten(-2)[:, : weight.layout.in_features].to(dtype).contiguous()


def _read_codebook(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return w = codebook[code] * absmax of its block."""
    layout, (codes, absmax, *nested) = weight.layout, weight.tensors
    assert codes is not None and absmax is not None
    absmax = plain_absmax(absmax, *nested)
    shape, block_size = (layout.out_features, layout.in_features), layout.group_size
    table = codebook_values(layout.codebook).to(codes.device)
    pairs = torch.cartesian_prod(table, table)  # both values of a byte, high nibble first
    values = pairs.index_select(0, codes.int()).view(-1)
    values = functional.pad(values, (0, absmax.numel() * block_size - values.numel()))
    values = values.view(-1, block_size).mul_(absmax.unsqueeze(-1)).view(-1)
    dense = values[: shape[0] * shape[1]].to(dtype)
    return (dense if dense.numel() == values.numel() else dense.clone()).view(shape)


def _read_int8(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return w = scale[row] * code."""
    codes, scales = weight.tensors
    assert codes is not None and scales is not None
    return (codes.float() * scales.unsqueeze(-1)).to(dtype)


_READERS = {
    "dense": _read_dense,
    "codebook": _read_codebook,
    "int_group": _read_int_group,
    "int8": _read_int8,
}

# int group: w = scale * q + offset ---------------------------------------------------------------


@reference.implements("int_group_grad_statistics")
def int_group_grad_statistics(
    grad: Tensor, x: Tensor, weight: Weight, units: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute d scale[o, g] = sum over j in g of (dyᵀ x)[o, j] * q[o, j], and d offset; float32."""
    product = (grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])).float()
    values, group_size = _codes(weight), weight.layout.group_size
    grad_scales = _in_groups(product.mul_(values), group_size).sum(-1)
    grad_offsets = int_group_grad_offsets(grad, x, group_size)
    if units is None:
        return grad_scales, grad_offsets
    return grad_scales * units, grad_offsets * units


@reference.implements("int_group_grad_offsets")
def int_group_grad_offsets(grad: Tensor, x: Tensor, group_size: int) -> Tensor:
    """Compute d offset[o, g] = sum over tokens of dy[o] * groupsum(x)[g]; float32."""
    pooled = _in_groups(x.reshape(-1, x.shape[-1]), group_size).sum(-1, dtype=torch.float32)
    return grad.reshape(-1, grad.shape[-1]).float().T @ pooled


@reference.implements("int_group_quantize")
def int_group_quantize(
    weight: Tensor, bits: int, group_size: int, statistics: torch.dtype, smallest_scale: float
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Round to nearest between each group's minimum and maximum."""
    pieces = []
    # Row pieces keep the float32 temporaries small beside the weight.
    for rows in weight.split(max(1, (1 << 22) // weight.shape[1])):
        values = rows.float()
        scales, offsets = fit_groups(values, bits, group_size, statistics, smallest_scale)
        grouped = _in_groups(values, group_size)
        codes = nearest_codes(grouped, scales.float()[..., None], offsets.float()[..., None], bits)
        codes = codes.flatten(-2)[:, : values.shape[1]]
        pieces.append((pack_codes(codes, bits), scales, offsets))
    if len(pieces) == 1:
        return pieces[0]
    all_planes, all_scales, all_offsets = zip(*pieces, strict=True)
    planes = [torch.cat(plane) for plane in zip(*all_planes, strict=True)]
    return planes, torch.cat(all_scales), torch.cat(all_offsets)


def fit_groups(
    weight: Tensor, bits: int, group_size: int, statistics: torch.dtype, smallest_scale: float
) -> tuple[Tensor, Tensor]:
    """Return scales and offsets [rows, groups] from each group's minimum and maximum.

    The filler of a short last group repeats the row's last weight, which moves neither.
    """
    short = -weight.shape[1] % group_size
    if short:
        weight = torch.cat([weight, weight[:, -1:].expand(-1, short)], dim=1)
    low, high = weight.unflatten(-1, (-1, group_size)).aminmax(dim=-1)
    offsets = low.to(statistics)
    # From the rounded offset to the maximum, so that the maximum stays representable.
    scales = ((high - offsets.float()) / ((1 << bits) - 1)).clamp_(min=smallest_scale)
    return scales.to(statistics), offsets


def nearest_codes(values: Tensor, scales: Tensor, offsets: Tensor, bits: int) -> Tensor:
    """Return the codes uint8 of the grid points nearest to the values."""
    codes = ((values - offsets) / scales).round_().clamp_(0, (1 << bits) - 1)
    return codes.to(torch.uint8)


# codebook: w = codebook[code] * absmax -----------------------------------------------------------


@reference.implements("codebook_quantize")
def codebook_quantize(weight: Tensor, codebook: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantise the flattened weight block by block to the nearest codebook value.

    The details follow bitsandbytes so that codes and absmax are equal bit for bit: float32
    throughout, a full block multiplies by the reciprocal of its absmax, a short last block divides.
    """
    flat = weight.reshape(-1)
    # Pieces keep the temporaries small beside the weight; each holds whole blocks and bytes.
    pieces = flat.split(2 * block_size * _PIECE_BLOCKS)
    quantised = [_quantize_piece(piece.float(), codebook, block_size) for piece in pieces]
    codes, absmax = zip(*quantised, strict=True)
    return torch.cat(codes), torch.cat(absmax)


_PIECE_BLOCKS = 1 << 14


def _quantize_piece(flat: Tensor, codebook: str, block_size: int) -> tuple[Tensor, Tensor]:
    full = flat.numel() // block_size * block_size
    blocks = flat[:full].view(-1, block_size)
    absmax = blocks.abs().amax(-1)
    normalised = [(blocks * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(-1)).view(-1)]
    if full < flat.numel():
        tail = flat[full:]
        tail_absmax = tail.abs().max().clamp(min=1e-38)
        absmax = torch.cat([absmax, tail_absmax.view(1)])
        normalised.append(tail / tail_absmax)
    if flat.numel() % 2:
        normalised.append(flat.new_zeros(1))
    bounds, code_of_rank = quantisation_bounds(codebook)
    values = torch.cat(normalised).clamp_(-1, 1)
    ranks = torch.bucketize(values, bounds.to(flat.device), out_int32=True)
    quantised = code_of_rank.to(flat.device).index_select(0, ranks)
    return (quantised[::2] << 4) | quantised[1::2], absmax


@reference.implements("codebook_quantize_absmax")
def codebook_quantize_absmax(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Round absmax - offset to 8-bit dynamic codes in blocks of 256."""
    centred = absmax - offset
    short = -centred.numel() % NESTED_BLOCK_SIZE
    blocks = functional.pad(centred, (0, short)).view(-1, NESTED_BLOCK_SIZE)
    scales = blocks.abs().amax(-1)
    # The clamp keeps the reciprocal finite; a denormal scale occurs when all weights are zero.
    normalised = blocks * (1.0 / scales.clamp(min=3e-39)).unsqueeze(-1)
    # bitsandbytes' CPU kernel rounds through a table of 65,536 entries; so do we.
    index = ((normalised + 1.0) * 32767.5 + 0.5).floor().clamp(0, 65535).int().view(-1)
    codes = dynamic_code_table().to(absmax.device).index_select(0, index)
    # Any code stands for 0 where the scale is 0; bitsandbytes writes code 0 there.
    codes = torch.where(scales.unsqueeze(-1) > 0, codes.view_as(blocks), 0).view(-1)
    return codes[: absmax.numel()].clone(), scales
