"""Odds ratio preference optimisation, arXiv 2403.07691."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from graft.data.batches import Batch
from graft.objectives.config import ObjectiveConfig
from graft.objectives.sequences import (
    PairObjective,
    SequenceBatch,
    log_probabilities,
    pairs,
    rewarded,
)


class OddsRatio(PairObjective):
    """-m(chosen) - beta log sigmoid(log(odds(chosen) / odds(rejected))): equations 6 and 7.

    m is the mean log p of an answer's tokens, p = exp(m), odds = p / (1 - p). It needs no
    reference: a reward is beta m, as TRL's is.
    """

    name = "orpo"
    options = frozenset({"beta"})

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def configured(self, config: ObjectiveConfig) -> Self:
        """Return it with its beta."""
        return type(self)(config.beta)

    def problems(self, config: ObjectiveConfig) -> list[str]:
        """Return which of its options cannot be."""
        return [] if config.beta > 0 else [f"--beta is {config.beta}; expected more than 0"]

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        """Return the sum over the pairs, and of their rewards."""
        assert isinstance(batch, SequenceBatch)
        sums, counts = log_probabilities(model, batch)
        chosen, rejected = pairs(batch, sums / counts)
        log_odds = chosen - rejected - (_log1mexp(chosen) - _log1mexp(rejected))
        losses = -chosen - self.beta * logsigmoid(log_odds)
        return losses.sum().float(), rewarded(self.beta * chosen, self.beta * rejected)


def _log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) of x < 0, in float64; a probability of 1 counts as 1 - 1e-15."""
    return torch.log(-torch.expm1(x.clamp(max=-1e-15)))


ORPO = OddsRatio(ObjectiveConfig.beta)
