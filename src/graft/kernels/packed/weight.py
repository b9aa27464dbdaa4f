"""A frozen weight as the kernels see it: its packed tensors and how to read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor, nn

from graft.kernels.packed.codebooks import dynamic_code

NESTED_BLOCK_SIZE = 256
"""Absmax values that share one scale when the constants are quantised themselves."""

_OWN = frozenset((nn.Parameter, type(None)))

MOST_TENSORS = 4
"""Packed tensors of a weight of any kind, at most."""


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

    @property
    def tensors(self) -> int:
        """How many tensors a weight of this kind has."""
        return {"dense": 1, "int8": 2}.get(self.kind, MOST_TENSORS)


@dataclass(eq=False, slots=True)
class Weight:
    """A frozen weight [out_features, in_features]: its tensors in the order that kernels take them.

    dense: (weight,); codebook: (codes, absmax, absmax_scale or None, absmax_offset or None);
    int_group: (codes, codes_high or None, scales, offsets); int8: (codes, scales).
    """

    layout: Layout
    tensors: tuple[Tensor | None, ...]
    prepared: Any = None
    """What a backend has made of the tensors and wants to find again; it checks that it holds."""

    def __reduce__(self) -> tuple[type[Weight], tuple[Any, ...]]:
        """Leave out what a backend prepared: addresses mean nothing to a copy."""
        return Weight, (self.layout, self.tensors)

    @property
    def lasts(self) -> bool:
        """Whether the tensors are a module's own, which live on whoever lets go of this weight."""
        return _OWN.issuperset(map(type, self.tensors))

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """The scales and offsets of an int group weight."""
        _, _, scales, offsets = self.tensors
        assert scales is not None and offsets is not None
        return scales, offsets

    def moved(self, scales: Tensor | None, offsets: Tensor | None) -> Weight:
        """Return the int group weight with the same codes and other scales and offsets."""
        return Weight(self.layout, (*self.tensors[:2], scales, offsets))


def dense_weight(tensor: Tensor) -> Weight:
    """Return a dense tensor [out_features, in_features] as a weight."""
    return Weight(Layout("dense", *tensor.shape), (tensor,))


def int_group_weight(
    planes: Sequence[Tensor], scales: Tensor, offsets: Tensor, layout: Layout
) -> Weight:
    """Return the weight of packed codes and their statistics."""
    codes, codes_high, *_ = (*planes, None)
    return Weight(layout, (codes, codes_high, scales, offsets))


def weight_of(layout: str, *tensors: Tensor | None) -> Weight:
    """Return the weight that an operator's arguments stand for: its layout's word, its tensors."""
    parsed = Layout.parse(layout)
    return Weight(parsed, tensors[: parsed.tensors])


def save_weight(ctx: Any, weight: Weight, *others: Tensor | None) -> None:
    """Save a weight, and other tensors before it, for the backward pass of an operation."""
    ctx.layout, ctx.weight = weight.layout, weight if weight.lasts else None
    ctx.save_for_backward(*others, *weight.tensors)


def saved_weight(ctx: Any) -> tuple[Weight, Sequence[Any]]:
    """Return the weight and the other tensors that `save_weight` saved.

    It is the very weight, with what a backend prepared of it, where its tensors are the same.
    """
    saved, count = ctx.saved_tensors, ctx.layout.tensors
    others, tensors = saved[:-count], saved[-count:]
    if ctx.weight is not None and all(map(is_, ctx.weight.tensors, tensors)):
        return ctx.weight, others
    return Weight(ctx.layout, tensors), others


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
