"""How the frozen weights are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FormatName = Literal["dense", "nf4", "fp4", "int8", "int", "latent"]


@dataclass(frozen=True, kw_only=True)
class FormatConfig:
    """The storage of the frozen weights; None means the default of the method."""

    format: FormatName | None = None
    """dense, nf4, fp4, int8, int (group-wise integers with float offsets), or latent (int, rounded
    anew from the weight, which is kept in bf16: for merge_aware)."""
    bits: int | None = None
    """Bits per code of the int and latent formats: 2, 3, 4 (default) or 8."""
    group_size: int | None = None
    """Inputs that share a scale and an offset in the int and latent formats: 8, 16, 32 (default),
    64 or 128."""
    double_quant: bool | None = None
    """Quantise the constants of nf4 and fp4 too; saves 0.373 bit per weight."""
