"""Held-out rows that a training row nearly is: runs of tokens that both have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from graft.data.examples import Example
from graft.data.storage.facts import columns_of

RUN = 8
"""Tokens of a run."""
SHARE = 0.6
"""Of a held-out row's own runs, from which on a training row that has them is nearly that row."""
MOST_HELD_OUT = 2_000
"""Held-out examples that are compared."""
MOST_TRAINING = 200_000
"""Training examples that they are compared with."""

_FEWEST_RUNS = 6
_OWN = 0.1
"""Share of a row's runs that must be its own for the row to be judged."""
_COMMON = 0.02
"""Share of the held-out rows from which on a run is their template and nobody's own."""
_LOT = 1024
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_SLOT_BITS = 22


@dataclass(frozen=True)
class Near:
    """A held-out example, the training example that is most like it, each by its number."""

    held_out: int
    training: int
    share: float
    """Of the held-out row's own runs of tokens."""


def near_rows(training: Sequence[Example], held_out: Sequence[Example]) -> list[Near]:
    """Return the held-out rows that a training row nearly is, those that are most alike first.

    A run that many rows have, as a template does, is nobody's own; a row with few runs of its own
    is not judged. The time is linear in the training rows, the memory in those held out.
    """
    tested = list(islice(held_out, MOST_HELD_OUT))
    runs, owners, counts = _own_runs(tested, [*training[:_LOT]])
    best = np.zeros(len(tested))
    found = np.full(len(tested), -1)
    if not len(runs):
        return []
    slots = np.zeros(1 << _SLOT_BITS, np.bool_)
    slots[runs >> np.uint64(64 - _SLOT_BITS)] = True
    distinct, begins = np.unique(runs, return_index=True)
    ends = np.append(begins[1:], len(runs))
    for first, hashes, rows in _lots(training):
        likely = slots[hashes >> np.uint64(64 - _SLOT_BITS)]
        hashes, rows = hashes[likely], rows[likely]
        place = np.minimum(np.searchsorted(distinct, hashes), len(distinct) - 1)
        same = distinct[place] == hashes
        pairs = np.unique(np.stack([rows[same], place[same]], axis=1), axis=0)
        if not len(pairs):
            continue
        # Each run that a training row has counts once for every held-out row that has it.
        sizes = (ends - begins)[pairs[:, 1]]
        offsets = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        owner = owners[np.repeat(begins[pairs[:, 1]], sizes) + offsets]
        keys, shared = np.unique(
            np.repeat(pairs[:, 0], sizes) * len(tested) + owner, return_counts=True
        )
        row, whose = keys // len(tested), keys % len(tested)
        share = shared / counts[whose]
        for index in np.flatnonzero(share >= SHARE):
            if share[index] > best[whose[index]]:
                best[whose[index]] = share[index]
                found[whose[index]] = first + row[index]
    order = sorted(np.flatnonzero(found >= 0), key=lambda number: -best[number])
    return [Near(int(number), int(found[number]), float(best[number])) for number in order]


def _own_runs(
    rows: Sequence[Example], others: Sequence[Example]
) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the runs that are the rows' own, sorted, whose each is, and how many each row has.

    others: a sample of further rows, which share their template.
    """
    runs, owners = _runs_of(rows)
    totals = np.bincount(owners, minlength=len(rows))
    for sample, found in ((rows, runs), (others, _runs_of(others)[0])):
        distinct, frequency = np.unique(found, return_counts=True)
        own = ~np.isin(runs, distinct[frequency > max(2.0, _COMMON * len(sample))])
        runs, owners = runs[own], owners[own]
    counts = np.bincount(owners, minlength=len(rows))
    judged = counts[owners] >= np.maximum(_FEWEST_RUNS, _OWN * totals[owners])
    return runs[judged], owners[judged], counts


def _runs_of(rows: Sequence[Example]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return the runs of each row, each once, sorted, and which row has each."""
    lots = [(hashes, first + numbers) for first, hashes, numbers in _lots(rows)]
    if not lots:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    hashes, owners = (np.concatenate(column) for column in zip(*lots, strict=True))
    pairs = np.unique(np.stack([hashes, owners.astype(np.uint64)], axis=1), axis=0)
    return pairs[:, 0], pairs[:, 1].astype(np.int64)


def _lots(
    rows: Sequence[Example],
) -> Iterator[tuple[int, NDArray[np.uint64], NDArray[np.int64]]]:
    """Yield, lot by lot, the number of its first row, hashes of all runs, and which row has each.

    Hashes are sums of products modulo 2^64, the same for the same tokens wherever they stand.
    """
    for first in range(0, min(len(rows), MOST_TRAINING), _LOT):
        columns = columns_of([*rows[first : first + _LOT]])
        ids, ends = columns.ids.astype(np.uint64), columns.ends
        if len(ids) < RUN:
            continue
        hashes = np.zeros(len(ids) - RUN + 1, np.uint64)
        for place in range(RUN):
            hashes *= _FACTOR
            hashes += ids[place : place + len(hashes)] + np.uint64(1)
        hashes *= _FACTOR
        owner = np.searchsorted(ends[1:], np.arange(len(hashes)), side="right")
        whole = np.arange(len(hashes)) + RUN <= ends[1:][owner]
        yield first, hashes[whole], owner[whole]
