"""The loss on examples, with the very masks of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from graft.data.batches import batch_in_order
from graft.data.examples import Example
from graft.objectives.base import LossResult, Objective
from graft.objectives.registry import DEFAULT_OBJECTIVE, OBJECTIVES


def evaluate_loss(
    model: PreTrainedModel,
    examples: Sequence[Example],
    batch_size: int = 16,
    objective: Objective | None = None,
    on_batch: Callable[[], None] | None = None,
) -> LossResult:
    """Return the mean loss over all targets; changes neither the model nor its mode.

    objective: what the model was trained for, by default to predict the next token. on_batch is
    called before each batch.
    """
    objective = objective or OBJECTIVES[DEFAULT_OBJECTIVE]
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total = 0.0
    targets: float = 0
    sums: dict[str, float] = {}
    with torch.no_grad():
        for examples_of_batch in batch_in_order(examples, batch_size):
            if on_batch is not None:
                on_batch()
            batch = objective.collate(examples_of_batch)
            loss, measured = objective.loss(model, batch.to(device))
            total += loss.double().item()
            targets += batch.targets
            sums = {name: sums.get(name, 0.0) + value for name, value in measured.items()}
    model.train(was_training)
    means = {name: value / targets for name, value in sums.items()}
    return LossResult(total / targets, targets, means)
