"""Integer weights of other tools as those of the int format: streams of codes, and statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from graft.errors import GraftError
from graft.formats.base import Packed
from graft.formats.int_group import GROUP_SIZES, SMALLEST_SCALE, IntGroupFormat
from graft.kernels.moves.reference import round_once
from graft.kernels.packed.planes import PLANES

BITS = tuple(PLANES)
STREAMED_BITS = (2, 3, 4, 5, 6, 7, 8)
"""Widths that `unpack_words` reads; codes of 5, 6 and 7 bits are held in 8 (`held_bits`)."""


@dataclass
class Rounding:
    """The largest change of a weight by the rounding of its scale and offset to fp16, in steps.

    A step is the scale of the weight's group.
    """

    steps: float = 0.0


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Return the codes of rows of 32-bit words, uint8 [rows, words * 32 / bits].

    words: int32 or uint32 [rows, words]; a row is one stream of bits, the first code lowest. With
    3, 5, 6 or 7 bits the number of words must make whole bytes of eight codes.
    """
    stream = words.contiguous().view(torch.uint8)
    if bits == 8:
        return stream
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        return (stream.unsqueeze(-1) >> shifts & (1 << bits) - 1).flatten(-2)
    # Eight codes fill `bits` bytes, which are at most seven and so fit into one number.
    whole = torch.zeros(*stream.shape[:-1], stream.shape[-1] // bits, dtype=torch.int64)
    for place, byte in enumerate(stream.unflatten(-1, (-1, bits)).unbind(-1)):
        whole |= byte.long() << 8 * place
    codes = torch.empty(*whole.shape, 8, dtype=torch.uint8)
    for place in range(8):
        codes[..., place] = whole >> bits * place & (1 << bits) - 1
    return codes.flatten(-2)


def width_of(words: int, codes: int, name: str, tool: str, read: tuple[int, ...] = BITS) -> int:
    """Return the bits of a code, of which `codes` lie in `words` 32-bit words.

    Raises GraftError for a width that is not among those that are read.
    """
    bits = words * 32 / codes if codes else 0
    if bits not in read:
        raise GraftError(
            f"{name} holds {codes} codes in {words} 32-bit words, {bits:g} bits each; graft reads "
            f"{tool} of {', '.join(map(str, read))} bits: start from the unquantised model"
        )
    return int(bits)


def held_bits(bits: int) -> int:
    """Return the narrowest width of the int format that holds codes of `bits` bits."""
    return min(width for width in PLANES if width >= bits)


def fitting_group_size(group_size: int, groups: int) -> int | None:
    """Return the largest group of the int format into which groups of `group_size` can be cut.

    None where there is none; a row that is one group can always be cut, into groups of which the
    last is short.
    """
    fitting = [size for size in GROUP_SIZES if group_size % size == 0]
    if not fitting and groups > 1:
        return None
    return max(fitting, default=GROUP_SIZES[-1])


def held_group_size(name: str, group_size: int, groups: int) -> int:
    """Return `fitting_group_size`; raises GraftError where there is none."""
    fitting = fitting_group_size(group_size, groups)
    if fitting is None:
        raise GraftError(
            f"{name}: its groups are of {group_size} inputs; graft holds multiples of "
            f"{GROUP_SIZES[0]}: start from the unquantised model"
        )
    return fitting


def pack_integers(
    weight_format: IntGroupFormat,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor,
    group_size: int,
    rounding: Rounding,
) -> Packed:
    """Return w = scale q + offset as packed tensors, and measure the rounding of the statistics.

    codes: uint8 [out_features, in_features]; scales, offsets: float64 [out_features, g], one for
    `group_size` inputs, which are repeated for the format's shorter groups. A scale of zero becomes
    a positive one with codes of zero, which is the same weight, so that no reader divides by zero.
    Raises GraftError when float16 cannot hold the statistics.
    """
    dtype: torch.dtype = getattr(torch, weight_format.statistics)
    stored = [round_once(values, dtype) for values in (scales, offsets)]
    if not all(bool(values.isfinite().all()) for values in stored):
        raise GraftError(
            f"its scales or offsets are not finite in {weight_format.statistics}, which ends at "
            f"{torch.finfo(dtype).max:,.6g}: the checkpoint is damaged, or its statistics need a "
            "wider range; start from the unquantised model"
        )
    constant = stored[0] == 0
    kept = torch.where(constant, 0.0, stored[0].double())
    moved = (kept - scales).abs() * weight_format.levels + (stored[1].double() - offsets).abs()
    step = torch.where(scales == 0, SMALLEST_SCALE, scales.abs())
    rounding.steps = max(rounding.steps, float((moved / step).max()))
    if bool(constant.any()):
        stored[0] = torch.where(constant, SMALLEST_SCALE, stored[0])
        codes = codes * ~constant.repeat_interleave(group_size, -1)[:, : codes.shape[1]]
    repeats = math.ceil(group_size / weight_format.group_size)
    groups = weight_format.groups(codes.shape[1])
    scales, offsets = (
        values.repeat_interleave(repeats, -1)[:, :groups].contiguous() for values in stored
    )
    return weight_format.pack_codes(codes, {"scales": scales, "offsets": offsets})
