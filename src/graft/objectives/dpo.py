"""Direct preference optimisation, arXiv 2305.18290."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

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


class DirectPreference(PairObjective):
    """-log sigmoid(r(chosen) - r(rejected)), r = beta (log p - log p before training): equation 7.

    log p is that of all of an answer's tokens. With label smoothing e a pair counts by 1 - e as it
    is and by e the other way round.
    """

    name = "dpo"
    options = frozenset({"beta", "label_smoothing"})
    needs_reference = True

    def __init__(self, beta: float, smoothing: float) -> None:
        self.beta, self.smoothing = beta, smoothing

    def configured(self, config: ObjectiveConfig) -> Self:
        """Return it with its beta and its label smoothing."""
        return type(self)(config.beta, config.label_smoothing)

    def problems(self, config: ObjectiveConfig) -> list[str]:
        """Return which of its options cannot be."""
        found = [] if config.beta > 0 else [f"--beta is {config.beta}; expected more than 0"]
        if not 0 <= config.label_smoothing < 0.5:
            found.append(
                f"--label-smoothing is {config.label_smoothing}; expected 0 up to, but not "
                "including, 0.5"
            )
        return found

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        """Return the sum over the pairs, and of their rewards."""
        assert isinstance(batch, SequenceBatch)
        found, _ = log_probabilities(model, batch)
        chosen, rejected = pairs(batch, self.beta * (found - batch.reference))
        margin = chosen - rejected
        losses = -(1 - self.smoothing) * logsigmoid(margin) - self.smoothing * logsigmoid(-margin)
        return losses.sum().float(), rewarded(chosen, rejected)


DPO = DirectPreference(ObjectiveConfig.beta, ObjectiveConfig.label_smoothing)
