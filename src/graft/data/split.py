"""Which examples are held out of training, to be evaluated on."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MOST_HELD_OUT = 500
"""Examples: enough to tell a loss to a hundredth."""


def held_out_examples(
    windows: Sequence[int] | NDArray[np.int32], fraction: float, seed: int
) -> set[int]:
    """Return the numbers of the examples that are held out; none where there is one example alone.

    windows: of each example, which window of its row it is, from 0. A share of 1 to 500 examples is
    drawn by the seed, all windows of a row or none, so that no part of a document is trained whose
    next part is held out. Where every row has too many for that, the last windows but one of the
    longest are taken: the last trains its end.
    """
    count = len(windows)
    wanted = min(max(round(count * fraction), 1), MOST_HELD_OUT, count - 1)
    if wanted < 1:
        return set()
    begins = np.flatnonzero(np.asarray(windows) == 0)
    ends = np.append(begins[1:], count)
    rows = range(len(begins))
    generator = random.Random(f"held-out {seed}")
    if len(begins) == count:
        return set(generator.sample(range(count), wanted))
    chosen: set[int] = set()
    for row in generator.sample(rows, len(rows)):
        if len(chosen) + ends[row] - begins[row] <= wanted:
            chosen.update(range(int(begins[row]), int(ends[row])))
    if not chosen:
        longest = int(np.argmax(ends - begins))
        last = int(ends[longest]) - 1
        chosen.update(range(max(int(begins[longest]), last - wanted), last))
    return chosen
