"""How texts are generated, and with which adapters; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """How tokens are computed and chosen, and where a text ends."""

    GROUP: ClassVar[str] = "generation"

    temperature: float = 0.0
    """0 is greedy; higher samples more freely."""
    top_k: int = 0
    """Sample among this many of the likeliest tokens alone; 0 means all."""
    top_p: float = 1.0
    """Sample among the fewest of the likeliest tokens that have this probability together; 1 means
    all."""
    seed: int = 0
    """Seed of the sampling."""
    stop: tuple[str, ...] = ()
    """Texts before the first of which generation ends, wherever the borders of tokens lie; a
    special token, such as <|im_end|>, is one too. A line's end is $'\\n' in bash."""
    max_length: int | None = None
    """Most tokens of prompt and answer together; default: what the model takes."""

    def options(self) -> dict[str, Any]:
        """Return the fields by name, as `graft.api.evaluate.generate` takes them."""
        return {field.name: getattr(self, field.name) for field in fields(DecodingConfig)}


@dataclass(frozen=True, kw_only=True)
class AdaptersConfig:
    """Which adapters a model computes with."""

    GROUP: ClassVar[str] = "adapters"

    adapter: tuple[str, ...] = ()
    """Adapters that are on beside the model's own: runs, or folders that PEFT or graft wrote. Their
    updates are added."""
    adapter_weights: tuple[float, ...] = ()
    """What each update is multiplied by, a number for each --adapter; default: 1."""
    no_adapter: bool = False
    """Leave a run's adapter out: its base, bit for bit."""
