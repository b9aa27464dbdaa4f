"""Weights w = scale code + offset of any width and grouping, in the int format where it holds them.

Codes of 1, 5, 6 and 7 bits lie in the next width that the int format has, which is the same weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from graft.convert.config import ConvertConfig
from graft.convert.grids.integers import BITS, Rounding, pack_integers, unpack_words
from graft.convert.source import DenseLayer, QuantisedLayer
from graft.formats.base import Packed
from graft.formats.int8 import Int8Format
from graft.formats.int_group import GROUP_SIZES, IntGroupFormat

_ROWS = 512
"""Rows that are dequantised at a time, in float64."""


@dataclass(frozen=True)
class Grid:
    """The parts of a weight [out_features, in_features]."""

    codes: Tensor
    """uint8 [out_features, in_features]."""
    scales: Tensor
    """[out_features, groups], float64."""
    offsets: Tensor
    """[out_features, groups], float64."""


def affine_layer(
    read: Callable[[], Grid],
    words: str,
    bits: int,
    group_of: Tensor,
    asked: ConvertConfig,
    rounding: Rounding,
) -> QuantisedLayer | DenseLayer:
    """Return the layer in the int format where neighbours share groups that this can hold.

    words: what the file holds, for the report. group_of: the group of each input. With
    `dequantise`, and where the int format has no such groups, it is the floats themselves.
    """
    chosen = _int_format(bits, group_of)
    if chosen is None or asked.dequantise:
        return DenseLayer(words, lambda: _dequantised(read(), group_of))
    weight_format, group_size, order = chosen

    def make() -> Packed:
        grid = read()
        scales, offsets = (part[:, order] for part in (grid.scales, grid.offsets))
        return pack_integers(weight_format, grid.codes, scales, offsets, group_size, rounding)

    return QuantisedLayer(weight_format, make)


def rows_layer(
    read: Callable[[], tuple[Tensor, Tensor]], words: str, asked: ConvertConfig
) -> QuantisedLayer | DenseLayer:
    """Return a weight of signed bytes with one scale for each row, which int8 holds exactly.

    read: returns int8 [out_features, in_features] and scales float32 [out_features].
    """

    def make() -> Packed:
        codes, scales = read()
        return {"codes": codes, "scales": scales}

    def dense() -> Tensor:
        codes, scales = read()
        return codes.float() * scales.unsqueeze(1)

    return DenseLayer(words, dense) if asked.dequantise else QuantisedLayer(Int8Format(), make)


def neighbours(in_features: int, group_size: int) -> Tensor:
    """Return the group of each input where groups are of neighbouring inputs."""
    return torch.arange(in_features) // group_size


def _int_format(bits: int, group_of: Tensor) -> tuple[IntGroupFormat, int, Tensor] | None:
    """Return the format, the size of the groups that are cut to it, and which those are, in order.

    None where the format has no such groups.
    """
    in_features, groups = len(group_of), int(group_of.max()) + 1
    held = min(width for width in BITS if width >= bits)
    group_size = in_features if groups == 1 else max(int((group_of == 0).sum()), 1)
    if torch.equal(group_of, neighbours(in_features, group_size)):
        fitting = [size for size in GROUP_SIZES if group_size % size == 0]
        if not fitting and groups > 1:
            return None
        size = max(fitting, default=GROUP_SIZES[-1])
        return IntGroupFormat(held, size), group_size, torch.arange(groups)
    for size in sorted(GROUP_SIZES, reverse=True):  # whole groups in another order
        first = group_of[::size]
        if in_features % size == 0 and torch.equal(group_of, first.repeat_interleave(size)):
            return IntGroupFormat(held, size), size, first
    return None


def _dequantised(grid: Grid, group_of: Tensor) -> Tensor:
    weight = torch.empty(grid.codes.shape, dtype=torch.float32)
    parts = (grid.codes, grid.scales, grid.offsets)
    for begin in range(0, len(weight), _ROWS):
        codes, scales, offsets = (part[begin : begin + _ROWS].double() for part in parts)
        weight[begin : begin + _ROWS] = codes * scales[:, group_of] + offsets[:, group_of]
    return weight


def unpack_stream(words: Tensor, bits: int, count: int) -> Tensor:
    """Return `count` codes of each row, uint8, where a row is one stream of bits, the first lowest.

    words: integers of any width [rows, words], enough for the codes.
    """
    if bits in (2, 4, 8):
        return unpack_words(words, bits)[:, :count]
    stream = words.contiguous().view(torch.uint8)
    codes = torch.empty(len(stream), count, dtype=torch.uint8)
    for begin in range(0, len(stream), _ROWS):
        part = stream[begin : begin + _ROWS]
        padded = torch.nn.functional.pad(part, (0, -part.shape[1] % bits))
        lots = padded.unflatten(-1, (-1, bits)).long()  # of 8 codes each
        whole = (lots << torch.arange(0, 8 * bits, 8)).sum(-1, keepdim=True)
        found = whole >> torch.arange(0, 8 * bits, bits) & (1 << bits) - 1
        codes[begin : begin + _ROWS] = found.flatten(-2)[:, :count]
    return codes
