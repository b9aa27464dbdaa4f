"""Kahneman-Tversky optimisation, arXiv 2402.01306."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from graft.data.batches import Batch
from graft.data.encode import EncodedData
from graft.data.examples import Example, sequences_of
from graft.data.storage.facts import Facts
from graft.data.storage.store import Examples, facts_of
from graft.errors import GraftError
from graft.objectives.base import Objective
from graft.objectives.config import ObjectiveConfig
from graft.objectives.sequences import SequenceBatch, log_probabilities, sequence_batch


@dataclass(frozen=True)
class JudgedBatch(SequenceBatch):
    """Answers, and beside them other rows' answers to the same prompts."""

    other_ids: Tensor
    other_labels: Tensor
    other_starts: Tensor
    other_reference: Tensor

    def others(self) -> SequenceBatch:
        """Return the batch of the other rows' answers."""
        count = len(self.other_reference)
        return SequenceBatch(
            self.other_ids,
            self.other_labels,
            self.other_starts,
            self.wanted.new_zeros(count),
            self.other_reference,
            self.count,
        )


class KahnemanTversky(Objective):
    """w (1 - sigmoid(r - z)) of a wanted answer, w' (1 - sigmoid(z - r)) of one that is not.

    r = beta (log p - log p before training), of all of an answer's tokens. z, which no gradient
    goes through, is beta times the mean over the batch of the same difference for each row's prompt
    with the answer of the next row of the data, where that is above 0: an estimate of how far the
    model is from what it was. Rows of pairs count as two answers.
    """

    name = "kto"
    counted = "answers"
    unit = "per answer"
    packs = True
    holds = ("judgements", "pairs")
    sequences = 2
    options = frozenset({"beta", "wanted_weight", "unwanted_weight"})
    adds_up = False
    needs_reference = True

    def __init__(self, beta: float, wanted: float, unwanted: float) -> None:
        self.beta, self.wanted, self.unwanted = beta, wanted, unwanted

    def configured(self, config: ObjectiveConfig) -> Self:
        """Return it with its beta and its weights."""
        return type(self)(config.beta, config.wanted_weight, config.unwanted_weight)

    def problems(self, config: ObjectiveConfig) -> list[str]:
        """Return which of its options cannot be."""
        given = {
            "beta": config.beta,
            "wanted-weight": config.wanted_weight,
            "unwanted-weight": config.unwanted_weight,
        }
        return [f"--{name} is {x}; expected more than 0" for name, x in given.items() if not x > 0]

    def arranged(self, data: EncodedData, max_length: int) -> EncodedData:
        """Return the rows, each with the next one's answer behind its prompt besides."""
        return replace(data, examples=Mismatched(data.examples, max_length))

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Make a batch of answers; raises GraftError when there are none."""
        return _batch(examples, packs=False)

    def pack(self, examples: Sequence[Example]) -> Batch:
        """Make a batch of answers without padding; raises GraftError when there are none."""
        return _batch(examples, packs=True)

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        """Return the sum over the answers, and of their rewards."""
        assert isinstance(batch, JudgedBatch)
        with torch.no_grad():
            others, _ = log_probabilities(model, batch.others())
            shift = self.beta * (others - batch.other_reference).mean().clamp(min=0)
        found, _ = log_probabilities(model, batch)
        rewards = self.beta * (found - batch.reference)
        wanted, unwanted = rewards[batch.wanted], rewards[~batch.wanted]
        losses = self.wanted * (1 - torch.sigmoid(wanted - shift)).sum()
        losses = losses + self.unwanted * (1 - torch.sigmoid(shift - unwanted)).sum()
        right = (wanted > shift).sum() + (unwanted < shift).sum()
        count = batch.wanted.sum()
        numbers = [wanted.sum(), unwanted.sum(), shift * len(rewards), count, right]
        names = ("wanted_rewards", "unwanted_rewards", "reference_point", "wanted_share")
        sums = torch.stack([number.detach().double() for number in numbers]).tolist()
        return losses.float(), dict(zip((*names, "reward_accuracy"), sums, strict=True))

    def measured(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the mean reward of wanted answers, of others, and the margin between them."""
        found = dict(metrics)
        if "wanted_share" not in found:
            return found
        wanted, unwanted = found.pop("wanted_rewards"), found.pop("unwanted_rewards")
        share = found.pop("wanted_share")
        if share > 0:
            found["reward_chosen"] = wanted / share
        if share < 1:
            found["reward_rejected"] = unwanted / (1 - share)
        if 0 < share < 1:
            found["reward_margin"] = found["reward_chosen"] - found["reward_rejected"]
        return found


def _batch(examples: Sequence[Example], packs: bool) -> JudgedBatch:
    own, others = list[Example](), list[Example]()
    known, known_of_others = list[float](), list[float]()
    for example in examples:
        sides, reference = sequences_of(example), example.values.get("reference", ())
        count = len(example.values["wanted"])
        own += sides[:count]
        others += sides[count:]
        known += reference[:count]
        known_of_others += reference[count:]
    batch = sequence_batch(own, known, packs, len(own))
    other = sequence_batch(others, known_of_others, packs, len(others))
    return JudgedBatch(
        **{one.name: getattr(batch, one.name) for one in fields(batch)},
        other_ids=other.input_ids,
        other_labels=other.labels,
        other_starts=other.starts,
        other_reference=other.reference,
    )


class Mismatched(Examples):
    """Examples, each with the next one's answer behind its own prompt as a further sequence.

    That of the last is the first's. The lengths that `facts` say are those of labelled rows; of
    pairs, whose next answer may be the shorter one, they are never too low.
    """

    def __init__(self, examples: Sequence[Example], max_length: int) -> None:
        """Take at least two examples; raises GraftError for fewer."""
        if len(examples) < 2:
            raise GraftError(
                "kto compares each row with the answer of another; give at least 2 rows to train "
                "on, and 2 that are held out (--eval-fraction, --eval-data)"
            )
        self._examples, self._max_length = examples, max_length

    def __len__(self) -> int:
        return len(self._examples)

    def at(self, number: int) -> Example:
        one = self._examples[number]
        own = sequences_of(one)
        other = sequences_of(self._examples[(number + 1) % len(self)])[0]
        asked, begin = own[0].targets.index(True), other.targets.index(True)
        ids = (own[0].input_ids[:asked] + other.input_ids[begin:])[: self._max_length]
        targets = ([False] * asked + other.targets[begin:])[: self._max_length]
        lengths = [*(len(side.input_ids) for side in own), len(ids)]
        return replace(
            one,
            input_ids=one.input_ids + ids,
            targets=one.targets + targets,
            values={**one.values, "lengths": lengths},
        )

    def place(self, number: int) -> str:
        return self._examples[number].where

    @cached_property
    def facts(self) -> Facts:
        own = facts_of(self._examples)
        answers = np.roll(own.lengths - own.prompts, -1)
        others = np.minimum(own.prompts + answers, self._max_length)
        return replace(
            own,
            lengths=(own.lengths + others).astype(np.int32),
            targets=(own.targets + others - own.prompts).astype(np.int32),
            largest=np.maximum(own.largest, np.roll(own.largest, -1)),
        )


KTO = KahnemanTversky(
    ObjectiveConfig.beta, ObjectiveConfig.wanted_weight, ObjectiveConfig.unwanted_weight
)
