"""How GPTQ's zero points are stored, as the weights show it.

A zero point z is stored as z - 1 (v1) or as z (v2), and folders carry the wrong label often enough.
Read the wrong way, every weight is off by one step of its grid. Two things tell the ways apart:

- In symmetric quantisation every zero point is half of the range, 2^(bits - 1).
- Weights are centred: the codes of a group lie around its zero point. Where the layer's average of
  q - z is a whole step from zero, the reading is off by one. At 2 to 4 bits that is many times what
  real weights are off their centre; at 8 bits a step is so small that it takes all layers together.

Minus one is taken code by code modulo 2^bits (AutoGPTQ), or from the whole word (GPTQModel), where
a zero point of 0 borrows from the next; of 3 bits, whose codes lie across words, the three words in
turn may have been taken in the wrong order. Which it was is asked of the codes that differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from graft.convert.grids.affine import unpack_stream

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
"""Bits of GPTQ's codes; graft holds those of 5, 6 and 7 in 8."""
Version = Literal["v1", "v2"]
Way = Literal["v1", "v2", "words", "turned", "unwrapped"]
"""How zero points come out of their words: v1 is code by code; see `read_zeros`."""
BY_WORDS: tuple[Way, ...] = ("words", "turned")
OTHER: dict[Version, Version] = {"v1": "v2", "v2": "v1"}

_DRIFT = 0.01
"""How far the mean of a layer's weights is taken to lie off zero, in their standard deviations."""
_SURE = 5.0
"""Standard errors that the finding must lie away from undecided."""
_NEAR = 0.25
"""How far from centred the right reading may lie, in steps; trained weights lie within 0.1."""
_CONSTANT = 32
"""Zero points of a layer that must all be half of the range to show symmetric quantisation."""
_PLAUSIBLE = 3.5
"""Standard errors of a group's mean that the right reading's zero point may lie off."""
_TERM, _CLEAR = 4.0, 8.0
"""The most that a single group counts for, and the sum that decides, in units of log-likelihood."""


@dataclass(frozen=True)
class LayerSample:
    """Some outputs of a layer: their zero points as stored, and where the codes of groups lie."""

    bits: int
    qzeros: Tensor
    """int32 [groups, words]."""
    means: Tensor
    """float32 [groups, outputs], of the codes."""
    spreads: Tensor
    """float32 [groups, outputs]: their standard deviations."""
    counts: Tensor
    """float32 [groups]: codes in each."""

    @property
    def _error(self) -> Tensor:
        """Return what a group's mean may be off by chance, [groups, outputs]."""
        spread = self.spreads.square().mean().sqrt().clamp(min=0.25)
        return (spread / self.counts.sqrt()).unsqueeze(-1).expand_as(self.means)

    def zeros(self, way: Way) -> Tensor:
        """Return the zero points, read in that way."""
        return read_zeros(self.qzeros, self.bits, way)

    def is_half(self, way: Way) -> bool:
        """Return whether every zero point is half of the range when read in that way."""
        zeros = self.zeros(way)
        return zeros.numel() >= _CONSTANT and bool((zeros == 1 << self.bits - 1).all())

    def off_centre(self) -> tuple[float, float]:
        """Return the mean of q - z halfway between v1 and v2, in steps, and its standard error.

        About a half if the zero points are v1, minus a half if they are v2.
        """
        v1, v2 = (self.means - self.zeros(way) for way in ("v1", "v2"))
        found = (float(v1.median()) + float(v2.median())) / 2
        by_output, spread = v2.mean(0), float(self.spreads.square().mean().sqrt())
        # A few groups that lie all on one side of zero say nothing, and must not hide the others.
        deviation = 1.4826 * float((by_output - by_output.median()).abs().median())
        chance = deviation / math.sqrt(len(by_output)) if len(by_output) > 1 else 1.0
        return found, math.hypot(chance, _DRIFT * spread, 0.02)

    def prefers(self, way: Way) -> float:
        """Return the evidence for a way to take one away, of the zero points that differ from v1.

        Positive for it, negative for v1, near zero where neither reading is plausible.
        """
        words, codes = self.zeros(way), self.zeros("v1")
        differ = words != codes
        error = self._error[differ]
        by_words, by_codes = (
            ((self.means - zeros)[differ] / error).abs().clamp(max=_PLAUSIBLE)
            for zeros in (words, codes)
        )
        terms = ((by_codes.square() - by_words.square()) / 2).clamp(-_TERM, _TERM)
        return float(terms.sum())


def read_zeros(qzeros: Tensor, bits: int, way: Way) -> Tensor:
    """Return zero points, int16 [groups, outputs], stored as v2, v1 (by codes) or v1 by words.

    qzeros: int32 [groups, words]. "turned" is by words of which the first and the last that hold
    whole codes have changed places, "unwrapped" v1 in which the largest code is 2^bits, not 0.
    """
    outputs = qzeros.shape[-1] * 32 // bits
    if way in ("words", "turned"):
        ones = _ones(bits)
        ones = (ones.flip(0) if way == "turned" else ones).repeat(qzeros.shape[-1] // len(ones))
        added = qzeros.view(torch.int32).long() + ones & 0xFFFFFFFF
        words = torch.where(added >= 1 << 31, added - (1 << 32), added).int()
        return unpack_stream(words, bits, outputs).short()
    stored = unpack_stream(qzeros, bits, outputs).short()
    if way == "v2":
        return stored
    return stored + 1 if way == "unwrapped" else stored + 1 & (1 << bits) - 1


def _ones(bits: int) -> Tensor:
    """Return the words of a stream of ones, int64, as few as fill whole codes."""
    period = 1 if 32 % bits == 0 else bits
    stream = sum(1 << place for place in range(0, 32 * period, bits))
    return torch.tensor([stream >> 32 * word & 0xFFFFFFFF for word in range(period)])


def group_sample(bits: int, qzeros: Tensor, codes: Tensor, group_of: Tensor) -> LayerSample:
    """Return the statistics of codes, uint8 [inputs, outputs], by the group of each input."""
    groups, values = qzeros.shape[0], codes.float()
    counts = torch.bincount(group_of, minlength=groups).float().clamp(min=1)
    empty = torch.zeros(groups, codes.shape[1])
    means = empty.index_add(0, group_of, values) / counts.unsqueeze(-1)
    squares = empty.index_add(0, group_of, values.square()) / counts.unsqueeze(-1)
    spreads = (squares - means.square()).clamp(min=0).sqrt()
    return LayerSample(bits, qzeros, means, spreads, counts)


@dataclass(frozen=True)
class Finding:
    """What the weights show of how their zero points are stored."""

    version: Version | None
    """None where they do not show it."""
    why: str


def find_version(samples: Sequence[LayerSample]) -> Finding:
    """Return how the zero points of a model are stored, from some layers of it."""
    if not samples:
        return Finding(None, "there is nothing to tell by")
    centred, steps = _by_centre(samples)
    half = _by_half(samples)
    if half and centred and half != centred:
        return Finding(None, "half of the range as zero points, and codes that lie elsewhere")
    if half:
        return Finding(half, "every zero point is then half of the range, as symmetric ones are")
    if centred:
        return Finding(
            centred,
            f"the codes then lie around their zero points ({abs(steps):.2f} of a step off in the "
            f"mean; {1 - abs(steps):.2f} as {OTHER[centred]})",
        )
    return Finding(None, "the codes lie too far around their zero points to tell by one step")


def _by_half(samples: Sequence[LayerSample]) -> Version | None:
    found: set[Version] = set()
    for sample in samples:
        if sample.is_half("v2"):
            found.add("v2")
        elif any(sample.is_half(way) for way in ("v1", *BY_WORDS)):
            found.add("v1")
    return found.pop() if len(found) == 1 else None


def _by_centre(samples: Sequence[LayerSample]) -> tuple[Version | None, float]:
    """Return what the layers' centres show together, and how far off it leaves them, in steps."""
    layers = torch.tensor([sample.off_centre() for sample in samples], dtype=torch.float64)
    found, weights = layers[:, 0], layers[:, 1] ** -2.0
    mean = float((found * weights).sum() / weights.sum())
    # Layers that differ by more than their errors make the mean less sure than the errors say.
    excess = float(((found - mean) ** 2 * weights).sum()) / max(len(samples) - 1, 1)
    error = math.sqrt(max(excess, 1.0) / float(weights.sum()))
    off = 0.5 - abs(mean)
    if abs(off) > _NEAR or abs(mean) < _SURE * error:
        return None, off
    return ("v1" if mean > 0 else "v2"), off


def find_way(samples: Sequence[LayerSample], default: Way) -> Way:
    """Return how minus one was taken from zero points of v1; `default` where it does not show."""
    shown = {way: sum(sample.prefers(way) for sample in samples) for way in BY_WORDS}
    best = max(BY_WORDS, key=lambda way: shown[way])
    if shown[best] >= _CLEAR:
        return best
    return "v1" if shown["words"] <= -_CLEAR else default
