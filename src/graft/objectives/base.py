"""What an objective says of itself, and what an evaluation of it finds."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

from torch import Tensor
from transformers import PreTrainedModel

from graft.data.batches import Batch, collate, pack
from graft.data.encode import EncodedData
from graft.data.examples import Example
from graft.data.shapes.base import Holds, RowShape
from graft.data.shapes.registry import SHAPES
from graft.errors import GraftError
from graft.objectives.config import ObjectiveConfig


@dataclass(frozen=True)
class LossResult:
    """Means over all targets of an evaluation."""

    loss: float
    """Of a target, in nats."""
    targets: float
    """What was averaged over, as `Batch.targets` counts it."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Whatever else the objective measures."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity_of(self.loss)


def perplexity_of(loss: float) -> float:
    """Return exp(loss), infinity where no float holds it, as of a damaged model."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


class Objective(ABC):
    """What is minimised: over a step's or an evaluation's batches, sum of losses / sum of targets.

    It has no state but its settings, and the teacher of one that has one: everything else is in
    the model and in the batch. The table holds each with the settings' defaults.
    """

    name: str
    options: ClassVar[frozenset[str]] = frozenset()
    """The options of `ObjectiveConfig` that mean something to it."""
    holds: ClassVar[tuple[Holds, ...]] = ("answers",)
    """What the rows have that it learns from, what is preferred first."""
    sequences: ClassVar[int] = 1
    """How many sequences a row is, as a plan counts them that knows no rows."""
    counted = "target_tokens"
    """What `Batch.targets` counts, as the metrics name it."""
    unit = "nats per token"
    """Of what its loss is a mean, in words."""
    packs = False
    """Its loss takes a `PackedBatch` too."""

    adds_up = True
    """A row's part of the loss does not depend on the other rows of its batch."""
    needs_reference = False
    """It compares the model with what it was before the first step: `Example.values` hold the
    `reference` of each of the example's sequences, the sum of its targets' log p then."""
    needs_teacher = False
    """It learns from another model, which `taught` gives it."""
    has_fixed_loss = False
    """It has a `fixed_loss`, and nothing is measured beside its loss."""

    def configured(self, config: ObjectiveConfig) -> Self:
        """Return it with its settings."""
        return self

    def problems(self, config: ObjectiveConfig) -> list[str]:
        """Return which of its options cannot be."""
        return []

    def taught(self, teacher: PreTrainedModel) -> Self:
        """Return it with a teacher; of one that `needs_teacher`."""
        raise NotImplementedError(self.name)

    def arranged(self, data: EncodedData, max_length: int) -> EncodedData:
        """Return the rows of a training or an evaluation as the loss takes them.

        Raises GraftError when they are too few.
        """
        return data

    def takes(self, shape: RowShape) -> bool:
        """Return whether rows of a shape hold what it needs."""
        return shape.holds in self.holds

    def check_rows(self, kind: str) -> None:
        """Raise GraftError when it cannot be trained on rows of the shape of that name."""
        if not self.takes(SHAPES[kind]):
            taken = [name for name in SHAPES if self.takes(SHAPES[name])]
            raise GraftError(
                f"objective {self.name} cannot be trained on {kind} rows; give rows of "
                f"{' or '.join(taken)}, or another --objective"
            )

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Make a batch of encoded rows; raises GraftError when there are none."""
        return collate(examples)

    def pack(self, examples: Sequence[Example]) -> Batch:
        """Make a batch of encoded rows without padding, where `packs` says that the loss takes it.

        Raises GraftError when there are none.
        """
        return pack(examples)

    @abstractmethod
    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        """Return the sum of the losses over the batch's targets, and of whatever else is measured.

        The batch is one that `collate` or `pack` made, on the model's device. In training the
        first, a 0-dimensional tensor, is divided by the targets of the whole step and
        differentiated; the others are recorded, divided likewise.
        """

    def measured(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return what is recorded of the means over targets of what `loss` measured besides."""
        return dict(metrics)

    def fixed_loss(self, model: PreTrainedModel, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Return the loss by operations that depend on the batch's shape alone.

        See `graft.train.graphs`; for objectives that say that they have it.
        """
        raise NotImplementedError

    def evaluation(self, result: LossResult) -> dict[str, float]:
        """Return what is recorded of an evaluation; `eval_loss` must be there."""
        more = {f"eval_{name}": value for name, value in self.measured(result.metrics).items()}
        return {"eval_loss": result.loss, f"eval_{self.counted}": result.targets, **more}
