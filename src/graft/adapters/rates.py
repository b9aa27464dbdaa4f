"""Default learning rates of AdamW, by what a step of it moves.

A step of Adam moves every element by the rate, so a layer's output moves with the number of inputs
that add up in it. The constants up to a width of 512 are measured ones; from there the rate falls
to the one that is in use at 4096.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from graft.adapters.base import lora_scaling
from graft.adapters.config import AdapterConfig


def low_rank_rate(config: AdapterConfig, hidden_size: int) -> float:
    """Return the peak rate of a low-rank update scaling B A beside or inside a weight.

    The smaller of 8e-3 * sqrt(128 / hidden_size) and 2.5e-4 * (4096 / hidden_size)^(4/3), times
    sqrt(16 / rank) / scaling, with scaling = alpha/rank (or alpha/sqrt(rank)), 1 by default:
    hidden_size inputs add up in A x, rank of them in B (A x), which begin with random signs (hence
    the root), and the scaling multiplies the update, so it divides the rate.
    """
    scaling = lora_scaling(config.update_rank, config.alpha, config.rslora)
    rate = min(8e-3 * math.sqrt(128 / hidden_size), 2.5e-4 * (4096 / hidden_size) ** (4 / 3))
    return float(rate * math.sqrt(16 / config.update_rank) / scaling)


def grid_rate(hidden_size: int) -> float:
    """Return the peak rate of moves in units of a group's scale: 5e-2 * sqrt(128 / hidden_size).

    The scale itself falls with the root of the width.
    """
    return 5e-2 * math.sqrt(128 / hidden_size)


def low_rank_moves_factors(
    config: AdapterConfig, hidden_size: int, names: Iterable[str]
) -> dict[str, float]:
    """Return what gives low-rank moves of a grid, u_B and v_B, a grid's rate; by parameter.

    The factors are in proportion to the default rate of LoRA.
    """
    factor = grid_rate(hidden_size) / low_rank_rate(config, hidden_size)
    return {name: factor for name in names if name.endswith((".u_B", ".v_B"))}


def weight_rate(hidden_size: int) -> float:
    """Return the peak rate of the weights themselves: 2e-5 * (4096 / hidden_size)."""
    return 2e-5 * (4096 / hidden_size)
