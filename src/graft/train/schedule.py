"""How many steps there are, when evaluations are due, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Mapping

from graft.adapters.config import AdapterConfig
from graft.adapters.registry import method_of
from graft.adapters.starts.registry import STARTS
from graft.errors import GraftError
from graft.train.config import LoopConfig


def default_learning_rate(config: AdapterConfig, hidden_size: int) -> float:
    """Return the default peak learning rate of AdamW: the method's, times the start's factor."""
    return method_of(config).learning_rate(config, hidden_size) * STARTS[config.init].rate


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


def steps_to_train(config: LoopConfig, rows: int) -> int:
    """Return the number of optimizer steps; raises GraftError when both or wrong ones are given."""
    if config.steps is not None and config.epochs is not None:
        raise GraftError("steps and epochs are both given; give one of them")
    if config.steps is not None:
        return config.steps
    epochs = 1.0 if config.epochs is None else config.epochs
    return max(1, round(epochs * rows / (config.batch_size * config.grad_accum)))


def steps_between_evaluations(config: LoopConfig, rows: int) -> float | None:
    """Return after how many steps, not always whole, an evaluation is due; None: only at the ends.

    Raises GraftError when both steps and epochs are given.
    """
    if config.eval_epochs is None:
        return config.eval_every
    if config.eval_every is not None:
        raise GraftError("eval_every and eval_epochs are both given; give one of them")
    return config.eval_epochs * rows / (config.batch_size * config.grad_accum)


def passes(interval: float | None, step: int) -> bool:
    """Return whether a multiple of the interval lies between the step before and this one."""
    return interval is not None and step // interval > (step - 1) // interval
