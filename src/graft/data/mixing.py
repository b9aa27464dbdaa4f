"""Weights of a mixture: how often each row of a source is trained in an epoch."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np

from graft.data.examples import Example
from graft.data.storage.store import Chosen, facts_of, places_of
from graft.errors import GraftError


def weighted(
    examples: Sequence[Example], weights: Mapping[str, float], seed: int
) -> Sequence[Example]:
    """Return examples as often as the weight of their file says; those of other files once.

    Of a weight's fraction so many rows are drawn, by the seed. The windows of a document stay
    together. Raises GraftError when a weight leaves none of a file's rows.
    """
    if not weights:
        return examples
    begins_row = facts_of(examples).windows == 0
    files = groupby(place.rpartition(":")[0] for place in places_of(examples))
    counts: list[np.ndarray] = []
    begin = 0
    for name, places in files:
        end = begin + sum(1 for _ in places)
        begins_row[begin] = True  # though the beginning of its document may be held out
        rows = int(begins_row[begin:end].sum())
        weight = weights.get(name, 1.0)
        count = np.full(rows, int(weight))
        share = round((weight - int(weight)) * rows)
        if rows and not int(weight) and not share:
            raise GraftError(
                f"{name}: its weight, {weight:g}, leaves none of its {rows:,} training rows; give "
                "a larger one, or take it out of the mixture"
            )
        count[random.Random(f"mixture {seed} {name}").sample(range(rows), share)] += 1
        counts.append(count)
        begin = end
    begins = np.flatnonzero(begins_row)
    sizes = np.diff(begins, append=len(examples))
    taken = np.repeat(np.arange(len(begins)), np.concatenate(counts))
    size = sizes[taken]
    # From each row's beginning on as many as it has, one row behind the other.
    within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
    return Chosen([examples], np.repeat(begins[taken], size) + within)
