"""Knowledge distillation, arXiv 1503.02531: the next token, and what a teacher thinks of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from torch import Tensor
from transformers import PreTrainedModel

from graft.data.batches import Batch, PackedBatch
from graft.errors import GraftError
from graft.model.running.token_losses import distillation_losses
from graft.objectives.base import LossResult, Objective, perplexity_of
from graft.objectives.config import ObjectiveConfig


class Distill(Objective):
    """(1 - w) (-log p) + w T² KL(teacher || model) of each trained token, in nats.

    The divergence is between the distributions of the whole next token, both of logits divided by
    the temperature T.
    """

    name = "distill"
    packs = True
    options = frozenset({"teacher", "teacher_format", "distill_weight", "distill_temperature"})
    needs_teacher = True

    def __init__(
        self, weight: float, temperature: float, teacher: PreTrainedModel | None = None
    ) -> None:
        self.weight, self.temperature, self.teacher = weight, temperature, teacher

    def configured(self, config: ObjectiveConfig) -> Self:
        """Return it with its weight and temperature, and no teacher yet."""
        return type(self)(config.distill_weight, config.distill_temperature)

    def problems(self, config: ObjectiveConfig) -> list[str]:
        """Return which of its options cannot be."""
        found = [] if config.teacher else ["--objective distill needs a teacher; give --teacher"]
        if not 0 < config.distill_weight <= 1:
            found.append(f"--distill-weight is {config.distill_weight}; expected above 0, up to 1")
        if not config.distill_temperature > 0:
            found.append(
                f"--distill-temperature is {config.distill_temperature}; expected more than 0"
            )
        return found

    def taught(self, teacher: PreTrainedModel) -> Self:
        """Return it with a teacher, which it never trains."""
        return type(self)(self.weight, self.temperature, teacher.requires_grad_(False).eval())

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        """Return the sum over the targets, and of the divergence and the next token's loss."""
        if self.teacher is None:
            raise GraftError("distill learns from a teacher, and was given none")
        starts = batch.starts if isinstance(batch, PackedBatch) else None
        given = batch.input_ids, batch.labels, starts
        losses, divergences = distillation_losses(model, self.teacher, given, self.temperature)
        loss = (1 - self.weight) * losses.sum() + self.weight * divergences.sum()
        measured = {"next_token_loss": losses.sum().item(), "divergence": divergences.sum().item()}
        return loss, measured

    def evaluation(self, result: LossResult) -> dict[str, float]:
        """Return the loss, its parts, and exp(the next token's loss)."""
        perplexity = perplexity_of(result.metrics.get("next_token_loss", result.loss))
        return {**super().evaluation(result), "perplexity": perplexity}


DISTILL = Distill(ObjectiveConfig.distill_weight, ObjectiveConfig.distill_temperature)
