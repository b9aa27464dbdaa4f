"""Batches of rows that have several sequences each, and the log-probabilities of these."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from graft.data.batches import IGNORED, Batch, PackedBatch, collate, pack
from graft.data.examples import Example, sequences_of
from graft.model.running.token_losses import target_losses
from graft.objectives.base import Objective


@dataclass(frozen=True)
class SequenceBatch(Batch):
    """The sequences of some rows, a row's own one after the other, padded or packed.

    Packed they are input_ids and labels [1, tokens], with `starts` as `PackedBatch` has it.
    """

    starts: Tensor
    """int32 [sequences + 1], or [0] where the sequences are padded."""
    wanted: Tensor
    """bool [sequences]: whether the answer is a wanted one."""
    reference: Tensor
    """float64 [sequences]: the sum of log p of each one's targets before training; NaN where
    nobody found it out."""
    count: Tensor
    """int64 []: what a mean over the batch is over."""

    @property
    def targets(self) -> float:
        """What a mean over the batch is over."""
        return int(self.count)


def sequence_batch(
    sides: Sequence[Example], known: Sequence[float], packs: bool, count: int
) -> SequenceBatch:
    """Return the batch of some sequences; raises GraftError when there are none.

    known: the reference of each, or nothing where nobody asks for it.
    """
    batch = pack(sides) if packs else collate(sides)
    starts = batch.starts if isinstance(batch, PackedBatch) else torch.zeros(0, dtype=torch.int32)
    return SequenceBatch(
        batch.input_ids,
        batch.labels,
        starts,
        torch.tensor([side.values.get("wanted") == [True] for side in sides]),
        torch.tensor(known or [math.nan] * len(sides), dtype=torch.float64),
        torch.tensor(count),
    )


def log_probabilities(model: PreTrainedModel, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
    """Return (sum of log p over each sequence's targets, their numbers), float64 [sequences]."""
    packs = len(batch.starts) > 0
    starts = batch.starts if packs else None
    losses = target_losses(model, batch.input_ids, batch.labels, starts)
    asked = functional.pad(batch.labels[:, 1:] != IGNORED, (0, 1))
    places = asked.flatten().nonzero().squeeze(1)
    if packs:
        owners = torch.searchsorted(batch.starts.long(), places, right=True) - 1
    else:
        owners = places // asked.shape[1]
    zeros = losses.new_zeros(len(batch.wanted), dtype=torch.float64)
    sums = zeros.index_add(0, owners, losses.double())
    counts = zeros.index_add(0, owners, torch.ones_like(losses, dtype=torch.float64))
    return -sums, counts


class PairObjective(Objective):
    """One that learns from a chosen and a rejected answer to each prompt."""

    counted = "pairs"
    unit = "per pair"
    packs = True
    holds = ("pairs",)
    sequences = 2

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Make a batch of pairs, each two rows of it; raises GraftError when there are none."""
        return _pairs(examples, packs=False)

    def pack(self, examples: Sequence[Example]) -> Batch:
        """Make a batch of pairs without padding; raises GraftError when there are none."""
        return _pairs(examples, packs=True)


def _pairs(examples: Sequence[Example], packs: bool) -> SequenceBatch:
    sides = [side for example in examples for side in sequences_of(example)]
    known = [value for example in examples for value in example.values.get("reference", ())]
    return sequence_batch(sides, known, packs, len(examples))


def pairs(batch: SequenceBatch, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values [sequences] of the chosen and those of the rejected answers, [pairs]."""
    return values[batch.wanted], values[~batch.wanted]


def rewarded(chosen: Tensor, rejected: Tensor) -> Mapping[str, float]:
    """Return the sums over pairs of what is measured of their rewards, [pairs]."""
    chosen, rejected = chosen.detach(), rejected.detach()
    sums = torch.stack(
        [
            chosen.sum(),
            rejected.sum(),
            (chosen - rejected).sum(),
            (chosen > rejected).sum().to(chosen.dtype),
        ]
    )
    names = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")
    return dict(zip(names, sums.tolist(), strict=True))
