"""Each trained token from those before it: the loss that language models are pretrained by."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from graft.data.batches import Batch, PackedBatch
from graft.model.running.loss import fixed_loss, target_loss
from graft.objectives.base import LossResult, Objective


class NextToken(Objective):
    """-log p(token | the tokens before it), summed over the trained tokens, in nats."""

    name = "next_token"
    packs = True
    has_fixed_loss = True

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        """Return the sum of -log p over the targets; nothing else is measured."""
        starts = batch.starts if isinstance(batch, PackedBatch) else None
        return target_loss(model, batch.input_ids, batch.labels, starts)[0], {}

    def fixed_loss(self, model: PreTrainedModel, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Return the same sum, with a row of logits for every token."""
        return fixed_loss(model, input_ids, labels)

    def evaluation(self, result: LossResult) -> dict[str, float]:
        """Return the loss, exp(loss), which becomes inf where that is large, and the count."""
        perplexity = torch.tensor(result.loss, dtype=torch.float64).exp().item()
        return {
            "eval_loss": result.loss,
            "perplexity": perplexity,
            "eval_target_tokens": result.targets,
        }


NEXT_TOKEN = NextToken()
