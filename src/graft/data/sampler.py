"""Which rows each batch has: shuffled anew for every epoch, and resumable at any batch."""

from __future__ import annotations

import itertools
import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graft.data.examples import Example
from graft.data.storage.store import facts_of
from graft.errors import GraftError

Lengths = npt.NDArray[np.int32]
"""Tokens of each row."""

LOT = 50
"""Batches whose rows are sorted by length together: more would save little padding, and fewer mix
the rows less."""

MOST_DRAWN = 4_000_000
"""Rows that `measure_batches` draws at most, a second for every million."""


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
            end = self._position + self.batch_size - len(batch)
            taken = self._order[self._position : end]
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
        # A text seed is hashed with SHA-512, so that neighbouring epochs share nothing.
        self._order = self._arranged(epoch, random.Random(f"seed {self.seed} epoch {epoch}"))

    def _arranged(self, epoch: int, chance: random.Random) -> array[int]:
        """Return the rows in the order of an epoch, in four bytes each: there may be millions."""
        order = array("i", range(self.count))
        chance.shuffle(order)
        return order


class GroupedSampler(BatchSampler):
    """Batches of rows of about one length: lots of an epoch's rows are sorted, cut and shuffled.

    Everything else is as in BatchSampler: each epoch has every row once, and batches that begin in
    one epoch and end in the next.
    """

    def __init__(self, lengths: Lengths, batch_size: int, seed: int) -> None:
        """Begin at epoch 0; raises GraftError when there is no row, or batch_size is below 1."""
        self._lengths = lengths
        super().__init__(len(lengths), batch_size, seed)

    def _arranged(self, epoch: int, chance: random.Random) -> array[int]:
        order = super()._arranged(epoch, chance)
        size = self.batch_size
        begin = -epoch * self.count % size  # the rows before are the rest of the last epoch's batch
        end = begin + max(0, self.count - begin) // size * size
        for lot in range(begin, end, LOT * size):
            rows = np.array(order[lot : min(end, lot + LOT * size)])
            by_length = rows[np.argsort(self._lengths[rows], kind="stable")]
            batches = by_length.reshape(-1, size).tolist()
            chance.shuffle(batches)
            order[lot : lot + len(rows)] = array("i", itertools.chain.from_iterable(batches))
        return order


def make_sampler(
    batching: str, examples: Sequence[Example], batch_size: int, seed: int
) -> BatchSampler:
    """Return the batches of a way of batching: 'grouped' has its own, all others share theirs."""
    if batching == "grouped":
        return GroupedSampler(facts_of(examples).lengths, batch_size, seed)
    return BatchSampler(len(examples), batch_size, seed)


@dataclass(frozen=True)
class BatchSizes:
    """What the batches of a run hold."""

    most_tokens: int
    """Of the rows of one batch, without padding; never too low."""
    padding: float
    """Share of the tokens that padding to each batch's longest row would be."""


def measure_batches(sampler: BatchSampler, lengths: Lengths, batches: int) -> BatchSizes:
    """Return what the next so many batches of a sampler hold.

    It draws at most MOST_DRAWN rows of them. Beyond, the share of padding is that of these, and the
    most tokens are those of the longest rows together.
    """
    batch_size = sampler.batch_size
    drawn = max(1, min(batches, MOST_DRAWN // batch_size))
    most = tokens = padded = 0
    while drawn:
        some = min(drawn, 1024)
        rows = np.array(list(itertools.islice(sampler, some)))
        found = lengths[rows].astype(np.int64)
        totals = found.sum(axis=1)
        most = max(most, int(totals.max()))
        tokens += int(totals.sum())
        padded += int(found.max(axis=1).sum()) * batch_size
        drawn -= some
    if batches * batch_size > MOST_DRAWN:
        longest = np.sort(lengths)[-batch_size:].astype(np.int64)
        most = int(longest.sum()) + (batch_size - len(longest)) * int(longest[-1])
    return BatchSizes(most, 1 - tokens / padded)
