"""What frozen layers compute with; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

Activations = Literal["float", "q8", "q8_token"]


@dataclass(frozen=True, kw_only=True)
class ActivationConfig:
    """What integer weights are multiplied with."""

    GROUP: ClassVar[str] = "quantisation"
    RARE: ClassVar[frozenset[str]] = frozenset({"activations"})

    activations: Activations | None = None
    """What integer weights (int in groups of 32 or more, int8) are multiplied with: their inputs as
    they are (float), or rounded to 8 bits, in blocks of 32 as llama.cpp does (q8) or with one scale
    a token (q8_token). Products of integers are faster on a CPU. A run remembers what it was
    trained with; the default of everything else is float."""
