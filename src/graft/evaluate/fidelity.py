"""How closely two models agree on the same tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graft.data.examples import Example
from graft.objectives.base import perplexity_of


@dataclass(frozen=True)
class Fidelity:
    """Differences between a reference's predictions and another model's, over targets."""

    mean_kl: float
    """Mean KL(reference || other) per position, in nats."""
    top1_agreement: float
    """Share of positions at which both predict the same token."""
    logit_difference: float
    """Largest |difference| of a logit, as a share of the reference's largest |logit|."""
    perplexity: float
    """The reference's, per target."""
    other_perplexity: float
    positions: int


class FidelitySum:
    """Compares logits text by text, in float64."""

    def __init__(self) -> None:
        self._divergence = self._agree = 0.0
        self._differences: list[float] = []
        self._largest: list[float] = []
        self._losses = [0.0, 0.0]
        self._positions = 0

    def add(self, example: Example, reference: Tensor, other: Tensor) -> None:
        """Add a row with a target at least, and both models' logits [tokens, vocabulary]."""
        asked = torch.tensor(example.targets[1:])
        following = torch.tensor(example.input_ids[1:])[asked, None]
        ours, theirs = (logits[:-1][asked].double() for logits in (reference, other))
        self._differences.append(float((ours - theirs).abs().max()))
        self._largest.append(float(ours.abs().max()))
        log_p, log_q = ours.log_softmax(-1), theirs.log_softmax(-1)
        self._divergence += float((log_p.exp() * (log_p - log_q)).sum())
        self._agree += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
        for index, log in enumerate((log_p, log_q)):
            self._losses[index] -= float(log.gather(-1, following).sum())
        self._positions += len(following)

    def result(self) -> Fidelity:
        """Return the figures over all rows, of which there is one at least."""
        perplexity, other = (perplexity_of(loss / self._positions) for loss in self._losses)
        return Fidelity(
            mean_kl=self._divergence / self._positions,
            top1_agreement=self._agree / self._positions,
            # PyTorch's maximum, for which NaN is the largest number.
            logit_difference=float(
                torch.tensor(self._differences).max() / torch.tensor(self._largest).max()
            ),
            perplexity=perplexity,
            other_perplexity=other,
            positions=self._positions,
        )
