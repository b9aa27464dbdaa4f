"""How the frozen weights are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from graft.formats.registry import FORMATS

FormatName = Annotated[str, FORMATS]
WIDTHS = (2, 3, 4, 8)
"""Bits per code of integers; what --bits auto chooses from."""


@dataclass(frozen=True, kw_only=True)
class FormatConfig:
    """The storage of the frozen weights; None means the default of the method."""

    GROUP: ClassVar[str] = "quantisation"
    RARE: ClassVar[frozenset[str]] = frozenset({"latent_dtype", "double_quant"})

    format: FormatName | None = None
    """How the frozen weights are stored; for merge_aware the grid that they are rounded to: int (or
    latent, which says the same), nf4 or fp4."""
    bits: int | Literal["auto"] | None = None
    """Bits per code of the int and latent formats: 2, 3, 4 (default) or 8; auto gives each layer
    its own width, by how much rounding it moves the loss on calibration text, within --budget."""
    budget: float | None = None
    """Bits per weight that --bits auto may take on average over the quantised layers, scales and
    offsets included (with groups of 32: 3.0 is all 2-bit codes, 5.0 all 4-bit ones)."""
    group_size: int | None = None
    """Inputs that share a scale and an offset in the int and latent formats: 8, 16, 32 (default),
    64 or 128."""
    latent_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    """What merge_aware keeps the weight in that it rounds; the default is float32 for a float32
    checkpoint and for 8-bit codes, else bfloat16. int8 takes 9 bits per weight in groups of 32,
    where bfloat16 takes 16; rounding in mid-training holds a float32 copy for a while all the
    same."""
    double_quant: bool | None = None
    """Quantise the constants of nf4 and fp4 too; saves 0.373 bit per weight."""
