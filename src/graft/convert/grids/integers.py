"""Integer weights of other tools as those of the int format: streams of codes, and statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graft.errors import GraftError
from graft.formats.base import Packed
from graft.formats.int_group import SMALLEST_SCALE, IntGroupFormat
from graft.kernels.moves.reference import round_once
from graft.kernels.packed.planes import PLANES

BITS = tuple(PLANES)


@dataclass
class Rounding:
    """The largest change of a weight by the rounding of its scale and offset to fp16, in steps.

    A step is the scale of the weight's group.
    """

    steps: float = 0.0


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Return the codes of rows of 32-bit words, uint8 [rows, words * 32 / bits].

    words: int32 or uint32 [rows, words]; a row is one stream of bits, the first code lowest. With
    3 bits the number of words is a multiple of 3.
    """
    stream = words.contiguous().view(torch.uint8)
    if bits == 8:
        return stream
    if bits == 3:
        first, second, third = stream.unflatten(-1, (-1, 3)).int().unbind(-1)
        whole = (first | second << 8 | third << 16).unsqueeze(-1)
        return (whole >> torch.arange(0, 24, 3, dtype=torch.int32) & 7).byte().flatten(-2)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (stream.unsqueeze(-1) >> shifts & (1 << bits) - 1).flatten(-2)


def width_of(words: int, codes: int, name: str, tool: str, read: Sequence[int] = BITS) -> int:
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
    stored = [round_once(values, torch.float16) for values in (scales, offsets)]
    if not all(bool(values.isfinite().all()) for values in stored):
        raise GraftError(
            "its scales or offsets are not finite in float16, which ends at 65,504: the checkpoint "
            "is damaged, or its statistics need a wider range; start from the unquantised model"
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
