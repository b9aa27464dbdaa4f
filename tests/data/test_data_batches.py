"""Rows as tensors: padding by position, and packing without any."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft.data.batches import batch_in_order, collate, pack
from graft.data.examples import Example
from graft.errors import GraftError


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
    for make in (collate, pack):
        with pytest.raises(GraftError, match="at least one example"):
            make([])


LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def examples_of(lengths: list[int]) -> list[Example]:
    """Return examples of these lengths; every second token is trained, a first one too."""
    begin, examples = 1, []
    for row, length in enumerate(lengths):
        ids = list(range(begin, begin + length))
        examples.append(Example(ids, [token % 2 == 0 for token in ids], f"d:{row}"))
        begin += length
    return examples


@given(LENGTHS)
def test_packed_rows_lie_one_behind_the_other(lengths):
    examples = examples_of(lengths)
    batch = pack(examples)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.input_ids.shape == batch.labels.shape == (1, sum(lengths))
    assert batch.starts.tolist() == [0, *itertools.accumulate(lengths)]
    assert batch.starts.dtype == torch.int32
    for row, (begin, end) in enumerate(itertools.pairwise(batch.starts.tolist())):
        assert batch.input_ids[0, begin:end].tolist() == examples[row].input_ids
        asked = [i if flag else -100 for i, flag in zip(*row_of(examples[row]), strict=True)]
        # Or the last token of the row before would be asked for it.
        assert batch.labels[0, begin:end].tolist() == [-100, *asked[1:]]


def row_of(example: Example) -> tuple[list[int], list[bool]]:
    return example.input_ids, example.targets


@given(LENGTHS)
def test_packed_and_padded_rows_have_the_same_targets(lengths):
    examples = examples_of(lengths)
    packed, padded = pack(examples), collate(examples)
    assert packed.targets == padded.targets
    asked = [batch.labels[:, 1:][batch.labels[:, 1:] != -100] for batch in (packed, padded)]
    assert torch.equal(*asked)


def test_a_batch_moves_with_all_that_it_has():
    moved = pack(examples_of([2, 3])).to(torch.device("meta"))
    assert all(getattr(moved, name).is_meta for name in ("input_ids", "labels", "starts"))


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
