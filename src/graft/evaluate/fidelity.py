"""How closely two models agree on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedModel

from graft.data.batches import batch_in_order, collate
from graft.data.encode import Example


@dataclass(frozen=True)
class Fidelity:
    """Differences between two models' predictions, over the target positions."""

    max_logit_difference: float
    """Largest |difference| of a logit."""
    max_logit: float
    """Largest |logit| of the reference, to judge the difference by."""
    mean_kl: float
    """Mean KL(reference || other) per position, in nats."""
    top1_agreement: float
    """Share of positions at which both predict the same token."""
    positions: int

    def as_dict(self) -> dict[str, float | int]:
        """Return the figures by name."""
        return asdict(self)


def compare_models(
    reference: PreTrainedModel,
    other: PreTrainedModel,
    examples: Sequence[Example],
    batch_size: int = 16,
) -> Fidelity:
    """Compare the two models' logits at every position that predicts a target, in float32."""
    difference = largest = divergence = agree = 0.0
    positions = 0
    with torch.no_grad():
        for examples_of_batch in batch_in_order(examples, batch_size):
            batch = collate(examples_of_batch)
            asked = batch.labels[:, 1:] != -100
            logits = [
                model(input_ids=batch.input_ids.to(model.device), use_cache=False)
                .logits[:, :-1][asked.to(model.device)]
                .float()
                .cpu()
                for model in (reference, other)
            ]
            log_p, log_q = (each.log_softmax(-1) for each in logits)
            difference = max(difference, (logits[0] - logits[1]).abs().max().item())
            largest = max(largest, logits[0].abs().max().item())
            divergence += (log_p.exp() * (log_p - log_q)).sum().item()
            agree += (logits[0].argmax(-1) == logits[1].argmax(-1)).sum().item()
            positions += int(asked.sum())
    return Fidelity(difference, largest, divergence / positions, agree / positions, positions)
