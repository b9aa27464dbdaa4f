"""What a model said of each row before its first step, which preference objectives compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from graft.data.examples import Example, sequences_of
from graft.data.storage.facts import Facts
from graft.data.storage.store import Examples, facts_of
from graft.errors import GraftError
from graft.model.running.modes import evaluating
from graft.model.save import save_tensors
from graft.model.weight_files import WeightFiles
from graft.objectives.sequences import log_probabilities, sequence_batch

Known = NDArray[np.float64]
"""[examples, sequences]: the sum of log p of each sequence's targets; NaN where it is not known,
and beyond the sequences of an example that has fewer than others."""


def unknown(examples: Sequence[Example]) -> Known:
    """Return a table of which nothing is known yet."""
    most = max(len(sequences_of(examples[number])) for number in (0, len(examples) - 1))
    return np.full((len(examples), most), np.nan)


def lacks(known: Known, numbers: Iterable[int]) -> list[int]:
    """Return those of the examples of which nothing is known."""
    return [number for number in numbers if np.isnan(known[number, 0])]


@torch.no_grad()
def find_out(
    known: Known,
    model: PreTrainedModel,
    examples: Sequence[Example],
    numbers: Sequence[int],
    batch_size: int,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Fill in what the model says of some examples; changes neither the model nor its mode.

    on_batch is told how many examples are done, and of how many, before each batch.
    """
    device = next(model.parameters()).device
    lengths = facts_of(examples).lengths
    ordered = sorted(numbers, key=lambda number: (-lengths[number], number))
    with evaluating(model):
        for begin in range(0, len(ordered), batch_size):
            on_batch(begin, len(ordered))
            some = ordered[begin : begin + batch_size]
            rows = [sequences_of(examples[number]) for number in some]
            batch = sequence_batch([side for row in rows for side in row], (), False, len(some))
            sums, _ = log_probabilities(model, batch.to(device))
            found = sums.cpu().numpy()
            for number, row in zip(some, rows, strict=True):
                known[number, : len(row)], found = found[: len(row)], found[len(row) :]


def save_known(path: Path, tables: dict[str, Known]) -> None:
    """Write tables to a safetensors file, whole or not at all."""
    save_tensors({name: torch.from_numpy(known) for name, known in tables.items()}, path)


def read_known(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Known]:
    """Return the tables of a file; raises GraftError when it is not whole, or of other rows."""
    with WeightFiles(path.parent, single_file=path.name) as files:
        for name, shape in shapes.items():
            if name not in files or files.dtype(name) != torch.float64:
                raise GraftError(f"{path} has no table of the {name} rows")
            if files.shape(name) != shape:
                raise GraftError(f"{path} is of other {name} rows")
        return {name: files.read(name).clone().numpy() for name in shapes}


class Referenced(Examples):
    """Examples that have what is known of them as `values["reference"]`, one number a sequence.

    Of rows that nobody asked about it is NaN, which no loss survives.
    """

    def __init__(self, examples: Sequence[Example], known: Known) -> None:
        self._examples, self._known = examples, known

    def __len__(self) -> int:
        return len(self._examples)

    def at(self, number: int) -> Example:
        one = self._examples[number]
        reference = self._known[number, : len(sequences_of(one))].tolist()
        return replace(one, values={**one.values, "reference": reference})

    def place(self, number: int) -> str:
        return self._examples[number].where

    @property
    def facts(self) -> Facts:
        return facts_of(self._examples)
