"""Batches: rows as tensors, padded to the longest or packed one behind the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from graft.data.examples import Example
from graft.data.storage.store import facts_of
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


@dataclass(frozen=True)
class PackedBatch(Batch):
    """Rows one behind the other, without padding, none of which may see another.

    input_ids, labels: int64 [1, tokens]; token 0 of a row is never a target, or the last token of
    the row before would be asked for it.
    """

    starts: Tensor
    """int32 [rows + 1]: row r has the positions starts[r] to starts[r + 1] - 1."""


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


def pack(examples: Sequence[Example]) -> PackedBatch:
    """Lay examples one behind the other, in their order.

    Raises GraftError when there are no examples.
    """
    if not examples:
        raise GraftError("a batch needs at least one example")
    ids = torch.tensor([token for example in examples for token in example.input_ids])
    targets = torch.tensor([flag for example in examples for flag in example.targets])
    lengths = torch.tensor([0, *(len(example.input_ids) for example in examples)])
    starts = lengths.cumsum(0)
    labels = ids.where(targets, IGNORED)
    labels[starts[:-1]] = IGNORED
    return PackedBatch(ids[None], labels[None], starts.int())


def batch_in_order(examples: Sequence[Example], batch_size: int) -> Iterator[list[Example]]:
    """Yield all examples once, longest first, so that memory peaks in the first batch."""
    ordered = np.argsort(-facts_of(examples).lengths, kind="stable")
    for begin in range(0, len(ordered), batch_size):
        yield [examples[number] for number in ordered[begin : begin + batch_size].tolist()]
