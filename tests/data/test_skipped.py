"""Rows that a training goes on without, and what is too much to go on without."""

from __future__ import annotations

import json

import pytest

from graft.data.config import DataConfig
from graft.data.joint import joint_notes
from graft.data.load import load_train_and_eval
from graft.data.rows import Reading, read_rows
from graft.errors import GraftError

SKIP = Reading(skip_bad_rows=True)
GOOD = [f'{{"prompt": "a{n}", "completion": "b"}}' for n in range(6)]
BAD = ['{"prompt": "a", "completion": ""}', "{oops", '{"text": "t"}', "[1]", '{"prompt": 1}']


def test_bad_rows_are_passed_over_and_named(write_lines):
    path = write_lines("a.jsonl", *GOOD[:3], *BAD, *GOOD[3:])
    rows = read_rows(path, SKIP)
    assert [row.fields["prompt"] for row in rows.rows] == [f"a{n}" for n in range(6)]
    assert rows.skipped is not None and rows.skipped.count == 5
    named = [json.loads(line) for line in rows.skipped.lines().splitlines()]
    assert [one["where"] for one in named] == [f"{path}:{line}" for line in range(4, 9)]
    assert named[0] == {
        "where": f"{path}:4",
        "reason": "'completion' is empty",
        "row": {"prompt": "a", "completion": ""},
    }
    assert named[1]["reason"].startswith("not valid JSON") and named[1]["row"] == "{oops"
    with pytest.raises(GraftError, match="5 problems"):
        read_rows(path)


@pytest.mark.parametrize(("good", "bad"), [(4, 5), (0, 3)])
def test_a_file_of_which_most_is_bad_is_refused_all_the_same(write_lines, good, bad):
    path = write_lines("a.jsonl", *GOOD[:good], *BAD[:bad])
    with pytest.raises(GraftError) as caught:
        read_rows(path, SKIP)
    message = str(caught.value)
    assert f"{bad} of {good + bad} rows are bad, which --skip-bad-rows does not pass" in message
    assert f"{path}:{good + 1}: 'completion' is empty" in message


def test_rows_that_cannot_be_trained_are_skipped_too(write_lines, tokenizer):
    long = json.dumps({"prompt": "x" * 90, "completion": "b"})
    path = write_lines("a.jsonl", *GOOD, long, BAD[0])
    config = DataConfig(data=path, max_length=32, skip_bad_rows=True)
    train, held_out = load_train_and_eval(config, tokenizer, None, 0)
    assert len(train.examples) + len(held_out.examples) == 6
    assert train.skipped is not None
    named = [json.loads(line) for line in train.skipped.lines().splitlines()]
    assert {one["where"]: one["reason"][:29] for one in named} == {
        f"{path}:8": "'completion' is empty",
        f"{path}:7": "no trained token is left afte",
    }
    assert named[-1]["row"] == {"prompt": "x" * 90, "completion": "b"}
    (note,) = train.notes
    assert note.startswith(
        f"2 bad rows are skipped (skipped.jsonl in a run's folder); the first: {path}"
    )
    config = DataConfig(data=path, max_length=32)
    with pytest.raises(GraftError, match=":8: 'completion' is empty"):
        load_train_and_eval(config, tokenizer, None, 0)


def test_where_prompt_and_answer_of_the_first_row_meet_is_shown(write_lines, tokenizer):
    row = json.dumps({"prompt": "x" * 99 + "end", "completion": "begin" + "y" * 99})
    path = write_lines("a.jsonl", row, '{"prompt": "p ", "completion": "c"}')
    (note,) = joint_notes(DataConfig(data=path, separator="\t->"), tokenizer)
    assert note == (
        f"the first row: its prompt ends in '...{'x' * 27}end', then comes '\\t->' (--separator), "
        f"then the completion: 'begin{'y' * 25}...'"
    )
    path = write_lines("b.jsonl", '{"prompt": "p ", "completion": "c"}')
    (note,) = joint_notes(DataConfig(data=path), tokenizer)
    assert "ends in 'p ', then comes nothing, then the completion: 'c'" in note
    path = write_lines("c.jsonl", '{"text": "t"}')
    assert joint_notes(DataConfig(data=path), tokenizer) == ()


def test_who_has_bad_rows_is_told_how_to_go_on_without(write_lines, tokenizer):
    long = json.dumps({"prompt": "x" * 90, "completion": "b"})
    path = write_lines("a.jsonl", long, *GOOD, long)
    with pytest.raises(GraftError, match=r"^rows that .*\(--skip-bad-rows .*\): 2 problems\n"):
        load_train_and_eval(DataConfig(data=path, max_length=32), tokenizer, None, 0)
