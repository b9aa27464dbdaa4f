"""Weights of a mixture: how often each row of a source is trained in an epoch."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np

from graft.data.examples import Example
from graft.data.store import Chosen


def weighted(
    examples: Sequence[Example], weights: Mapping[str, float], seed: int
) -> Sequence[Example]:
    """Return examples as often as the weight of their file says; those of other files once.

    Of a weight's fraction so many rows are drawn, by the seed. The windows of a document stay
    together.
    """
    if not weights:
        return examples
    rows: dict[str, list[list[int]]] = {}
    for number, example in enumerate(examples):
        source = rows.setdefault(example.where.rpartition(":")[0], [])
        if example.window and source:
            source[-1].append(number)
        else:
            source.append([number])
    numbers: list[int] = []
    for name, found in rows.items():
        weight = weights.get(name, 1.0)
        often = int(weight)
        share = round((weight - often) * len(found))
        drawn = set(random.Random(f"mixture {seed} {name}").sample(range(len(found)), share))
        for index, row in enumerate(found):
            numbers += row * (often + (index in drawn))
    return Chosen([examples], np.array(numbers, np.int64))
