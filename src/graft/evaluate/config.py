"""How texts are generated; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """How tokens are computed."""

    GROUP: ClassVar[str] = "generation"

    fast_decode: bool = False
    """Round what integer weights are multiplied with to 8 bits, in blocks of 32, as llama.cpp does:
    faster on a CPU, but no longer the very logits that were trained. Weights that are no integers
    in groups of 32 or more, and the prompt, are computed as ever."""
