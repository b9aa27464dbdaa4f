"""Which examples are held out of training, to be evaluated on."""

from __future__ import annotations

import random
from collections.abc import Sequence

MOST_HELD_OUT = 500
"""Examples: enough to tell a loss to a hundredth."""


def held_out_examples(windows: Sequence[int], fraction: float, seed: int) -> set[int]:
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
    begins = [index for index, window in enumerate(windows) if not window]
    ends = [*begins[1:], count]
    rows = range(len(begins))
    generator = random.Random(f"held-out {seed}")
    if len(begins) == count:
        return set(generator.sample(range(count), wanted))
    chosen: set[int] = set()
    for row in generator.sample(rows, len(rows)):
        if len(chosen) + ends[row] - begins[row] <= wanted:
            chosen.update(range(begins[row], ends[row]))
    if not chosen:
        longest = max(rows, key=lambda row: ends[row] - begins[row])
        last = ends[longest] - 1
        chosen.update(range(max(begins[longest], last - wanted), last))
    return chosen
