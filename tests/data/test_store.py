"""Examples in a mapped file are those that were written, and little of them is in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.data.examples import Example
from graft.data.storage.facts import columns_of
from graft.data.storage.store import Chosen, Stored, facts_of, packed, places_of, write_batches

PATH = "data.jsonl"


def stored(folder: Path, *batches: list[Example]) -> Stored:
    path = folder / "rows.arrow"
    write_batches(path, (packed(batch, PATH) for batch in batches))
    with path.open("rb") as file:
        return Stored(file, PATH)


def whole(example: Example) -> tuple[object, ...]:
    return *vars(example).values(), example.lost, example.window


EXAMPLES = st.builds(
    lambda tokens, *others: Example(
        [token for token, _ in tokens], [trained for _, trained in tokens], *others
    ),
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), max_size=12),
    st.sampled_from([f"{PATH}:1", f"{PATH}:row 7", "elsewhere.csv:3"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([{}, {"reward": 0.5, "of": ["a", None]}]),
    st.integers(0, 9),
    st.integers(0, 9),
)


@settings(max_examples=40)
@given(st.lists(st.lists(EXAMPLES, max_size=5), min_size=1, max_size=3))
def test_what_is_stored_is_what_is_read(tmp_path_factory, batches):
    found = stored(tmp_path_factory.mktemp("store"), *batches)
    expected = [example for batch in batches for example in batch]
    assert [whole(one) for one in found] == [whole(one) for one in expected]
    assert len(found) == len(expected)
    assert found == expected
    assert list(places_of(found)) == [one.where for one in expected]
    for name, column in columns_of(expected).facts.columns().items():
        assert column.tolist() == getattr(found.facts, name).tolist(), name


@given(st.lists(EXAMPLES, max_size=6))
def test_facts_are_what_the_examples_say(examples):
    facts = columns_of(examples).facts
    assert facts.lengths.tolist() == [len(one.input_ids) for one in examples]
    assert facts.targets.tolist() == [sum(one.targets) for one in examples]
    firsts = [one.targets.index(True) if any(one.targets) else len(one.targets) for one in examples]
    assert facts.prompts.tolist() == firsts
    assert facts.largest.tolist() == [max(one.input_ids, default=0) for one in examples]
    assert facts.cut.tolist() == [one.cut for one in examples]
    assert facts.trains_eos.tolist() == [one.trains_eos for one in examples]


def some(count: int, begin: int = 0) -> list[Example]:
    return [
        Example([number, number + 1], [False, True], f"{PATH}:{number}")
        for number in range(begin, begin + count)
    ]


def test_a_sequence_of_stored_examples_is_one(tmp_path):
    examples = some(7)
    found = stored(tmp_path, examples[:3], examples[3:])
    assert found[-1] == examples[-1]
    assert found[2:6:2] == examples[2:6:2]
    assert found[::-1] == examples[::-1]
    assert found[:0] == []
    assert examples[3] in found
    assert found != examples[:6]
    assert found != some(7, begin=1)
    with pytest.raises(IndexError):
        found[7]


def test_examples_are_chosen_from_several_sequences(tmp_path):
    parts = [stored(tmp_path, some(3)), some(2, begin=10)]
    chosen = Chosen(parts, np.array([4, 0, 0, 3, 2]))
    expected = [*some(1, 11), *some(1), *some(1), *some(1, 10), *some(1, 2)]
    assert chosen == expected
    assert chosen[1:3] == expected[1:3]
    assert facts_of(chosen).largest.tolist() == [12, 1, 1, 11, 3]
    assert list(places_of(chosen)) == [one.where for one in expected]
    assert facts_of(chosen[3:]).largest.tolist() == [11, 3]


def test_what_was_read_does_not_stay_in_memory(tmp_path):
    def resident() -> int:
        """Bytes of mapped files that are in memory."""
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssFile"):
                return int(line.split()[1]) * 1024
        pytest.skip("the system does not say what is resident")

    ids = list(range(2000))
    lot = [Example(ids, [True] * len(ids), f"{PATH}:1")] * 500
    batch = packed(lot, PATH)
    write_batches(tmp_path / "rows.arrow", [batch] * 16)
    before = resident()
    with (tmp_path / "rows.arrow").open("rb") as file:
        found = Stored(file, PATH)
    assert (tmp_path / "rows.arrow").stat().st_size > 60e6
    most = 0
    for number in range(len(found)):
        assert found[number].input_ids[-1] == 1999
        if number % 100 == 0:
            most = max(most, resident() - before)
    assert most < 25e6
