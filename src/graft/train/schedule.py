"""The learning rate: its default, and how it moves over the steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from graft.adapters.base import lora_scaling
from graft.adapters.config import AdapterConfig

_QALORA_SHARE = 0.7


def default_learning_rate(config: AdapterConfig, hidden_size: int) -> float:
    """Return the default peak learning rate of AdamW.

    lora, qlora, merge_aware: the smaller of 8e-3 * sqrt(128 / hidden_size) and
                         2.5e-4 * (4096 / hidden_size)^(4/3), * sqrt(16 / rank) / scaling
    qalora:              0.7 of that
    affine:              5e-2 * sqrt(128 / hidden_size)
    full:                2e-5 * (4096 / hidden_size)

    with scaling = alpha/rank (or alpha/sqrt(rank)), 1 by default. A step of Adam moves every
    element by the rate, so the output moves with the number of inputs that add up in it:
    hidden_size of them in A x, rank of them in B (A x), which begin with random signs (hence the
    root). The scaling multiplies the update, so it divides the rate. Affine moves are in units of a
    group's scale, which itself falls with the root of the width. The constants up to a width of 512
    are measured ones; from there the rate falls to the one that is in use at 4096.
    qalora's share is what going back to a known text wants; a new task takes either.
    """
    if config.method == "full":
        return 2e-5 * (4096 / hidden_size)
    if config.method == "affine":
        return 5e-2 * math.sqrt(128 / hidden_size)
    scaling = lora_scaling(config.update_rank, config.alpha, config.rslora)
    rate = min(8e-3 * math.sqrt(128 / hidden_size), 2.5e-4 * (4096 / hidden_size) ** (4 / 3))
    share = _QALORA_SHARE if config.method == "qalora" else 1.0
    return share * rate * math.sqrt(16 / config.update_rank) / scaling


def rate_factors(
    config: AdapterConfig, hidden_size: int, bits: Mapping[str, int]
) -> dict[str, float]:
    """Return by what the learning rate is multiplied for some of the parameters; 1 for the others.

    bits: the parameters' names, each with the width of its layer's codes.

    affine: v moves an offset by so many steps of the grid, u the scale by a share of itself. For
    one step of Adam to move the weights as far by either, v's rate grows with the number of steps
    in a group's range: (2^bits - 1) / 3, 1 at 2 bits.
    merge_aware and qalora: moves of the scales (and with merge_aware of the offsets) take affine's
    rate, in proportion to what the learning rate is of LoRA's default; not more at more bits, where
    merge_aware's codes move as finely.
    """
    if config.method == "affine":
        return {name: (2**width - 1) / 3 for name, width in bits.items() if name.endswith(".v")}
    if config.method not in ("merge_aware", "qalora"):
        return {}
    grid = default_learning_rate(dataclasses.replace(config, method="affine"), hidden_size)
    factor = grid / default_learning_rate(dataclasses.replace(config, method="lora"), hidden_size)
    return {name: factor for name in bits if name.endswith((".u_B", ".v_B"))}


def scheduled_learning_rate(step: int, steps: int, peak: float, warmup_fraction: float) -> float:
    """Return the rate of a step, counted from 1: linear warm-up, then a cosine to 0.

    The last step still has a rate above 0, since a step at rate 0 would be lost.
    """
    warmup = round(steps * warmup_fraction)
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup - 1) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
