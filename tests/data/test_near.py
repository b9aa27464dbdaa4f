"""Held-out rows that a training row nearly is, found by the runs of tokens that both have."""

from __future__ import annotations

import random
import time

from graft.data.examples import Example
from graft.data.near import MOST_TRAINING, near_rows

TEMPLATE = list(range(1000, 1040))


def row(number: int, tokens: list[int], name: str = "train") -> Example:
    return Example(tokens, [True] * len(tokens), f"{name}:{number}")


def drawn(seed: int, count: int = 40) -> list[int]:
    return random.Random(f"seed {seed}").choices(range(900), k=count)


def test_a_row_that_is_nearly_trained_is_found_with_its_twin() -> None:
    training = [row(number, TEMPLATE + drawn(number)) for number in range(3000)]
    changed = drawn(2500)
    changed[7] = 901  # a word
    shifted = drawn(1200)[3:] + [902, 903]
    half = drawn(77)[:20] + drawn(-1)[:20]
    others = [TEMPLATE + drawn(-number - 2) for number in range(60)]
    held_out = [TEMPLATE + changed, TEMPLATE + shifted, TEMPLATE + half, *others]
    found = near_rows(training, [row(n, tokens, "test") for n, tokens in enumerate(held_out)])
    assert [(one.held_out, one.training) for one in found] == [
        (0, 2500),
        (1, 1200),
    ]
    assert found[0].share > found[1].share > 0.6


def test_a_template_and_short_rows_make_no_twins() -> None:
    training = [row(number, TEMPLATE + [number]) for number in range(50)]
    held_out = [row(number, TEMPLATE + [number], "test") for number in range(50)]
    assert near_rows(training, held_out) == []
    long = [row(number, TEMPLATE + drawn(number, 10)) for number in range(50)]
    assert near_rows(long, [row(0, TEMPLATE + drawn(-1, 10), "test")]) == []
    assert near_rows(training, []) == [] == near_rows([], held_out)
    assert near_rows([row(0, [1, 2])], [row(0, [1, 2], "test")]) == []


def test_runs_end_with_their_rows() -> None:
    whole = drawn(5)
    training = [row(0, whole[:20]), row(1, whole[20:])]
    (found,) = near_rows(training, [row(0, whole[:26], "test")])
    assert found.training == 0 and found.share < 0.7
    assert near_rows([training[1], training[0]], [row(0, whole, "test")]) == []


def test_it_takes_time_as_the_training_rows_are_many() -> None:
    same = [row(number, drawn(number % 400, 60)) for number in range(400)] * 25
    held_out = [row(number, drawn(-number - 1, 60), "test") for number in range(500)]
    begin = time.process_time()
    assert near_rows(same, held_out) == []
    assert (time.process_time() - begin) / len(same) < 60e-6, "seconds for a training row"
    assert MOST_TRAINING * 60e-6 < 15
