"""Rows that are there twice: among the training rows, and in what is held out of training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graft.data.storage.facts import Facts


@dataclass(frozen=True)
class Overlap:
    """How many rows have the text of another one, but for white space and case."""

    repeated: int
    """Training rows whose text an earlier training row has."""
    held_out_trained: int
    """Held-out rows whose text a training row has."""
    prompts_trained: int
    """Held-out rows whose prompt a training row has, whatever its answer."""


def overlap(training: Facts, held_out: Facts) -> Overlap:
    """Count the rows that are there twice, in the time that it takes to sort them."""
    rows, held = _rows(training), _rows(held_out)
    keys = _known(training.row_keys[rows])
    return Overlap(
        repeated=len(keys) - len(np.unique(keys)),
        held_out_trained=int(np.isin(_known(held_out.row_keys[held]), keys).sum()),
        prompts_trained=int(
            np.isin(_known(held_out.prompt_keys[held]), training.prompt_keys[rows]).sum()
        ),
    )


def without_duplicates(training: Facts, held_out: Facts) -> NDArray[np.int64]:
    """Return which training examples are left when each text is trained once, none held out.

    All windows of a document stay, or none.
    """
    rows = _rows(training)
    keys = training.row_keys[rows]
    kept = np.zeros(len(rows), np.bool_)
    kept[np.unique(keys, return_index=True)[1]] = True
    kept &= ~np.isin(keys, held_out.row_keys[_rows(held_out)])
    kept |= keys == 0
    owners = np.searchsorted(rows, np.arange(len(training.lengths)), side="right") - 1
    # A document's beginning may be held out: then the windows that are left of it have no row.
    return np.flatnonzero(kept[owners] | (owners < 0))


def _known(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return keys[keys != 0]


def _rows(facts: Facts) -> NDArray[np.int64]:
    """Return the numbers of the examples that begin a row."""
    return np.flatnonzero(facts.windows == 0)
