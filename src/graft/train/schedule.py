"""The learning rate: its default, and how it moves over the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping

from graft.adapters.config import AdapterConfig
from graft.adapters.registry import method_of


def default_learning_rate(config: AdapterConfig, hidden_size: int) -> float:
    """Return the default peak learning rate of AdamW, which is the method's to say."""
    return method_of(config).learning_rate(config, hidden_size)


def rate_factors(
    config: AdapterConfig, hidden_size: int, bits: Mapping[str, int]
) -> dict[str, float]:
    """Return by what the learning rate is multiplied for some of the parameters; 1 for the others.

    bits: the parameters' names, each with the width of its layer's codes.
    """
    return method_of(config).rate_factors(config, hidden_size, bits)


def scheduled_learning_rate(step: int, steps: int, peak: float, warmup_fraction: float) -> float:
    """Return the rate of a step, counted from 1: linear warm-up, then a cosine to 0.

    The last step still has a rate above 0, since a step at rate 0 would be lost.
    """
    warmup = round(steps * warmup_fraction)
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup - 1) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
