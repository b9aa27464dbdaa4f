"""Batches: which rows a step sees, and their padding into tensors."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from graft.data.examples import Example
from graft.errors import GraftError

IGNORED = -100
"""Label of a token that is not trained: padding, prompts and position 0."""


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right; labels are not shifted.

    input_ids: int64 [batch, length], padding is id 0 (a causal model ignores what follows).
    labels: int64 [batch, length], the token's own id where it is trained, else -100.
    """

    input_ids: Tensor
    labels: Tensor

    @property
    def targets(self) -> float:
        """What a mean over the batch is over: the number of trained tokens."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def to(self, device: torch.device) -> Self:
        """Return the batch with its tensors, those of a subclass included, on a device."""
        moved = {field.name: getattr(self, field.name).to(device) for field in fields(self)}
        return replace(self, **moved)


def collate(examples: Sequence[Example]) -> Batch:
    """Pad examples to the longest one; masks follow positions, never token ids.

    Raises GraftError when there are no examples.
    """
    if not examples:
        raise GraftError("a batch needs at least one example")
    shape = (len(examples), max(len(example.input_ids) for example in examples))
    input_ids = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        ids = torch.tensor(example.input_ids, dtype=torch.int64)
        targets = torch.tensor(example.targets, dtype=torch.bool)
        input_ids[row, :length] = ids
        labels[row, :length] = ids.where(targets, IGNORED)
    return Batch(input_ids, labels)


class BatchSampler:
    """Endless batches of row numbers: every epoch is a fresh permutation, fixed by the seed.

    Every batch has batch_size rows; one that reaches the end of an epoch goes on in the next,
    so that every row is seen exactly once per epoch. The place is (epoch, position).
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        """Begin at epoch 0; raises GraftError when count or batch_size is below 1."""
        if count < 1 or batch_size < 1:
            raise GraftError(
                f"cannot make batches of {batch_size} from {count} rows; expected at least 1"
            )
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self._enter(0, 0)

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        """Return the next batch_size row numbers."""
        batch: list[int] = []
        while len(batch) < self.batch_size:
            if self._position == self.count:
                self._enter(self._epoch + 1, 0)
            taken = self._order[self._position :][: self.batch_size - len(batch)]
            batch.extend(taken)
            self._position += len(taken)
        return batch

    def state(self) -> dict[str, int]:
        """Return the place as plain numbers: epoch, position in it, and what they depend on."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "count": self.count,
            "seed": self.seed,
        }

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on exactly where state() was taken.

        Raises GraftError when the state belongs to other data or another seed, or is none.
        """
        if not state.keys() >= {"count", "seed", "epoch", "position"}:
            raise GraftError("cannot resume: the checkpoint's place in the data is incomplete")
        for name, now in (("count", self.count), ("seed", self.seed)):
            if state[name] != now:
                what = "number of training rows" if name == "count" else "seed"
                raise GraftError(
                    f"cannot resume: the checkpoint was made with {what} {state[name]}, now it "
                    f"is {now}; resume with the same data and --seed"
                )
        if not 0 <= state["position"] <= self.count or state["epoch"] < 0:
            raise GraftError(
                f"cannot resume: the checkpoint's place in the data is row {state['position']} of "
                f"{self.count} in epoch {state['epoch']}"
            )
        self._enter(state["epoch"], state["position"])

    def _enter(self, epoch: int, position: int) -> None:
        self._epoch = epoch
        self._position = position
        self._order = list(range(self.count))
        # A text seed is hashed with SHA-512, so that neighbouring epochs share nothing.
        random.Random(f"seed {self.seed} epoch {epoch}").shuffle(self._order)


def batch_in_order(examples: Sequence[Example], batch_size: int) -> Iterator[list[Example]]:
    """Yield all examples once, longest first, so that memory peaks in the first batch."""
    ordered = sorted(examples, key=lambda example: -len(example.input_ids))
    for begin in range(0, len(ordered), batch_size):
        yield ordered[begin : begin + batch_size]
