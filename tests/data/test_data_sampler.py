"""Samplers: every row once per epoch, going on exactly where they stopped; rows of one length."""

from __future__ import annotations

import itertools
import json
import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.data import sampler as sampler_module
from graft.data.examples import Example
from graft.data.sampler import (
    BatchSampler,
    GroupedSampler,
    make_sampler,
    measure_batches,
)
from graft.errors import GraftError


def take(sampler: BatchSampler, batches: int) -> list[list[int]]:
    return list(itertools.islice(sampler, batches))


def lengths(count: int, seed: int = 3) -> np.ndarray:
    """Return lengths as real rows have them: most are short, and a few are long."""
    return np.random.default_rng(seed).geometric(0.02, count).astype(np.int32)


def made(kind: str, count: int, batch_size: int, seed: int) -> BatchSampler:
    if kind == "grouped":
        return GroupedSampler(lengths(count), batch_size, seed)
    return BatchSampler(count, batch_size, seed)


@given(
    kind=st.sampled_from(["padded", "grouped"]),
    count=st.integers(1, 30),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 2**40),
    before=st.integers(0, 12),
)
def test_a_restored_sampler_goes_on_like_an_unbroken_one(kind, count, batch_size, seed, before):
    unbroken = take(made(kind, count, batch_size, seed), before + 8)
    assert all(len(batch) == batch_size for batch in unbroken)
    stopped = made(kind, count, batch_size, seed)
    take(stopped, before)
    state = json.loads(json.dumps(stopped.state()))
    resumed = made(kind, count, batch_size, seed)
    resumed.restore(state)
    assert resumed.state() == state
    assert take(resumed, 8) == unbroken[before:]
    # Every epoch holds every row once.
    seen = list(itertools.chain.from_iterable(unbroken))
    for begin in range(0, len(seen) - count + 1, count):
        assert sorted(seen[begin : begin + count]) == list(range(count))


def test_epochs_and_seeds_differ():
    orders = {tuple(take(BatchSampler(50, 50, seed), 1)[0]) for seed in range(5)}
    orders |= {tuple(batch) for batch in take(BatchSampler(50, 50, 0), 5)}
    assert len(orders) == 9  # seed 0, epoch 0 is in both


def test_the_order_is_pinned():
    # A change here breaks the resuming of every existing checkpoint.
    assert take(BatchSampler(5, 3, 0), 4) == [[4, 1, 0], [2, 3, 4], [3, 0, 1], [2, 2, 4]]


def test_a_state_of_other_data_is_refused():
    state = BatchSampler(10, 2, seed=1).state()
    with pytest.raises(GraftError, match="number of training rows 10, now it is 11"):
        BatchSampler(11, 2, seed=1).restore(state)
    with pytest.raises(GraftError, match="seed 1, now it is 2"):
        BatchSampler(10, 2, seed=2).restore(state)


@pytest.mark.parametrize(("count", "size"), [(0, 1), (1, 0), (-1, 3)])
def test_batches_of_nothing(count, size):
    with pytest.raises(GraftError, match="expected at least 1"):
        BatchSampler(count, size, 0)


def test_the_order_is_that_of_a_shuffled_list_in_a_tenth_of_its_memory():
    """Runs of earlier versions go on with it, and there may be millions of rows."""
    expected = list(range(5000))
    random.Random("seed 4 epoch 0").shuffle(expected)
    tracemalloc.start()
    sampler = BatchSampler(5000, 5000, 4)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 5000 * 4 + 10_000
    assert next(sampler) == expected


def padding(batches: list[list[int]], of: np.ndarray) -> float:
    padded = sum(of[batch].max() * len(batch) for batch in batches)
    return float(1 - sum(of[batch].sum() for batch in batches) / padded)


def test_rows_of_one_length_are_batched_together():
    of = lengths(3000)
    grouped = take(GroupedSampler(of, 16, 0), 180)
    assert padding(grouped, of) < 0.12 < 0.5 < padding(take(BatchSampler(3000, 16, 0), 180), of)
    # They come in no order of length: the first quarter is like the last.
    means = [of[batch].mean() for batch in grouped]
    assert np.mean(means[:45]) == pytest.approx(np.mean(means[-45:]), rel=0.3)
    assert grouped != take(GroupedSampler(of, 16, 1), 180)


def test_batches_stay_grouped_where_epochs_end_inside_a_batch():
    of = lengths(103)
    assert padding(take(GroupedSampler(of, 8, 0), 60), of) < 0.25


def test_each_way_of_batching_has_its_sampler():
    rows = [Example([1] * length, [False] * length, "") for length in (3, 1, 2)]
    assert [len(next(make_sampler("grouped", rows, 2, seed))) for seed in range(2)] == [2, 2]
    assert type(make_sampler("grouped", rows, 2, 0)) is GroupedSampler
    for kind in ("packed", "padded", "auto"):
        assert type(make_sampler(kind, rows, 2, 0)) is BatchSampler


@pytest.mark.parametrize("kind", ["padded", "grouped"])
@pytest.mark.parametrize(("count", "size", "batches"), [(200, 16, 5), (30, 4, 40), (3, 8, 7)])
def test_what_the_batches_hold_is_measured(kind, count, size, batches):
    of = lengths(count)
    drawn = take(made(kind, count, size, 0), batches)
    sizes = measure_batches(made(kind, count, size, 0), of, batches)
    assert sizes.most_tokens == max(of[batch].sum() for batch in drawn)
    assert sizes.padding == pytest.approx(padding(drawn, of))


def test_what_is_not_drawn_is_bounded(monkeypatch):
    of = lengths(200)
    monkeypatch.setattr(sampler_module, "MOST_DRAWN", 64)
    sizes = measure_batches(BatchSampler(200, 16, 0), of, 10**9)
    assert sizes.most_tokens == np.sort(of)[-16:].sum()
    assert measure_batches(BatchSampler(3, 8, 0), of[:3], 10**9).most_tokens >= max(
        of[batch].sum() for batch in take(BatchSampler(3, 8, 0), 50)
    )
