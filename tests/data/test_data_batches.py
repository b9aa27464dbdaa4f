"""Padding by position, and a sampler that goes on exactly where it stopped."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft.data.batches import batch_in_order, collate
from graft.data.examples import Example
from graft.data.sampler import BatchSampler
from graft.errors import GraftError


def take(sampler: BatchSampler, batches: int) -> list[list[int]]:
    return list(itertools.islice(sampler, batches))


def test_padding_and_labels():
    batch = collate(
        [
            Example([5, 0, 7, 0], [False, True, False, True], "d:1"),
            Example([2, 2], [False, True], "d:2"),
        ]
    )
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.input_ids.tolist() == [[5, 0, 7, 0], [2, 2, 0, 0]]
    # Token 0 is trained where it is a target: padding is told by position, not by id.
    assert batch.labels.tolist() == [[-100, 0, -100, 0], [-100, 2, -100, -100]]


def test_an_empty_batch_is_an_error():
    with pytest.raises(GraftError, match="at least one example"):
        collate([])


@given(
    count=st.integers(1, 30),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 2**40),
    before=st.integers(0, 12),
)
def test_a_restored_sampler_goes_on_like_an_unbroken_one(count, batch_size, seed, before):
    unbroken = take(BatchSampler(count, batch_size, seed), before + 8)
    assert all(len(batch) == batch_size for batch in unbroken)
    stopped = BatchSampler(count, batch_size, seed)
    take(stopped, before)
    state = json.loads(json.dumps(stopped.state()))
    resumed = BatchSampler(count, batch_size, seed)
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


def test_evaluation_sees_every_row_once_longest_first():
    lengths = [3, 9, 1, 9, 4]
    examples = [
        Example([1] * length, [False] * length, f"d:{row}") for row, length in enumerate(lengths)
    ]
    batches = list(batch_in_order(examples, 2))
    assert [[example.where for example in batch] for batch in batches] == [
        ["d:1", "d:3"],
        ["d:4", "d:0"],
        ["d:2"],
    ]
