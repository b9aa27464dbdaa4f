"""A frozen weight as the kernels see it: its packed tensors and how to read them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from torch import Tensor

from graft.kernels.packed.codebooks import dynamic_code

NESTED_BLOCK_SIZE = 256
"""Absmax values that share one scale when the constants are quantised themselves."""


@dataclass(frozen=True)
class Layout:
    """How the tensors of a packed weight are read; `text` and `parse` turn it into a word and back.

    kind: 'dense', 'codebook', 'int_group' or 'int8'. group_size: inputs per group, or weights per
    block of a codebook.
    """

    kind: str
    out_features: int
    in_features: int
    bits: int = 0
    group_size: int = 0
    codebook: str = "-"

    def text(self) -> str:
        """Return the layout as one word, which an operator can take as an argument."""
        return (
            f"{self.kind}/{self.out_features}/{self.in_features}/{self.bits}/{self.group_size}"
            f"/{self.codebook}"
        )

    @staticmethod
    @cache
    def parse(text: str) -> Layout:
        """Return the layout that `text` wrote."""
        kind, rows, columns, bits, group_size, codebook = text.split("/")
        return Layout(kind, int(rows), int(columns), int(bits), int(group_size), codebook)


@dataclass(frozen=True)
class Weight:
    """A frozen weight [out_features, in_features]: its tensors in the order that kernels take them.

    dense: (weight,); codebook: (codes, absmax, absmax_scale or None, absmax_offset or None);
    int_group: (codes, codes_high or None, scales, offsets); int8: (codes, scales).
    """

    layout: Layout
    tensors: tuple[Tensor | None, ...]


def weight_of(layout: str, *tensors: Tensor | None) -> Weight:
    """Return the weight that an operation's arguments stand for: its layout's word, its tensors."""
    parsed = Layout.parse(layout)
    count = {"dense": 1, "int8": 2}.get(parsed.kind, 4)
    return Weight(parsed, tensors[:count])


class Latent(NamedTuple):
    """A latent weight W + scaling B A [out_features, in_features] that rounds to int group codes.

    A and B are float32, or None where there is no update; scales and offsets are the grid's.
    """

    weight: Tensor
    scales: Tensor
    offsets: Tensor
    A: Tensor | None
    B: Tensor | None
    scaling: float
    bits: int
    group_size: int


def plain_absmax(absmax: Tensor, scale: Tensor | None, offset: Tensor | None) -> Tensor:
    """Return absmax float32 [blocks]; with nested statistics (uint8 codes) they are read first.

    absmax = dynamic_code[code] * scale[block of 256] + offset (QLoRA, arXiv 2305.14314, section 3).
    """
    if scale is None or offset is None:
        return absmax
    values = dynamic_code().to(absmax.device).index_select(0, absmax.int())
    scales = scale.repeat_interleave(NESTED_BLOCK_SIZE)[: values.numel()]
    return values.mul_(scales).add_(offset)
