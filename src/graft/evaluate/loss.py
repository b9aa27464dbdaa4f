"""Loss and perplexity on examples, with the very masks of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from graft.data.batches import batch_in_order, collate
from graft.data.encode import Example
from graft.model.running.loss import target_loss


@dataclass(frozen=True)
class LossResult:
    """Mean loss over the target tokens."""

    loss: float
    """Mean -log p of a target token, in nats."""
    target_tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


def evaluate_loss(
    model: PreTrainedModel, examples: Sequence[Example], batch_size: int = 16
) -> LossResult:
    """Return the mean loss over all target tokens; changes neither the model nor its mode."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    with torch.no_grad():
        for examples_of_batch in batch_in_order(examples, batch_size):
            batch = collate(examples_of_batch)
            loss, targets = target_loss(model, batch.input_ids.to(device), batch.labels.to(device))
            total += loss.double().item()
            count += targets
    model.train(was_training)
    return LossResult(total / count, count)
