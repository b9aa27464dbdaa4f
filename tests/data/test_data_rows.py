"""Kinds of rows, and everything that can be wrong with one, told with file and line."""

from __future__ import annotations

import json

import pytest

from graft.data.rows import read_rows
from graft.errors import GraftError

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "kind", "fields", "ignored"),
    [
        ({"text": "a"}, "text", {"text": "a"}, ()),
        (
            {"prompt": "", "completion": "b", "id": 3},
            "prompt",
            {"prompt": "", "completion": "b"},
            ("id",),
        ),
        (
            {"instruction": "a", "input": "", "output": "b"},
            "instruction",
            {"instruction": "a", "input": "", "output": "b"},
            (),
        ),
        (
            {"instruction": "a", "input": None, "output": "b"},
            "instruction",
            {"instruction": "a", "input": "", "output": "b"},
            (),
        ),
        (
            {"output": "b", "instruction": "a", "z": 1, "b": 2},
            "instruction",
            {"instruction": "a", "input": "", "output": "b"},
            ("b", "z"),
        ),
        ({"messages": [USER, ANSWER]}, "messages", {"messages": [USER, ANSWER]}, ()),
    ],
)
def test_kinds(write_lines, row, kind, fields, ignored):
    path = write_lines("a.jsonl", json.dumps(row))
    rows = read_rows(path)
    assert (rows.kind, rows.ignored_keys) == (kind, ignored)
    assert [(one.where, one.fields) for one in rows.rows] == [(f"{path}:1", fields)]


ACCEPTED = "accepted keys of a row: text; or prompt, completion; or instruction, output"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"why": "a", "because": "b"}, f"found keys why, because; {ACCEPTED}"),
        ({"prompt": "a"}, f"found keys prompt; {ACCEPTED}"),
        ({}, f"found keys none; {ACCEPTED}"),
        ([1], f"a list; expected an object; {ACCEPTED}"),
        ("text", "a string; expected an object"),
        (None, "null; expected an object"),
        ({"text": 3}, "'text' is of type int; expected a string"),
        ({"text": " \n"}, "'text' is empty"),
        ({"text": "a\ud800"}, "'text' holds half of a surrogate pair ('\\ud800' at character 1)"),
        ({"prompt": None, "completion": "a"}, "'prompt' is null; expected a string"),
        ({"prompt": "a", "completion": ""}, "'completion' is empty"),
        ({"instruction": "", "output": "a"}, "'instruction' is empty"),
        ({"instruction": "a", "output": "a", "input": 1}, "'input' is of type int"),
        ({"messages": "hi"}, "'messages' is a string; expected a list of objects"),
        ({"messages": []}, "'messages' is an empty list; expected at least one message"),
        ({"messages": [ANSWER, USER, ANSWER]}, "message 1: the assistant speaks first"),
        ({"messages": [USER]}, "no message of role 'assistant' (roles: user)"),
        ({"messages": [USER, "x"]}, "message 2 is a string; expected an object"),
        (
            {"messages": [{"by": "human", "value": "x"}, ANSWER]},
            "message 1: 'role' is missing (keys: by, value)",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            "message 2: 'content' is null; expected a string",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": " "}]},
            "message 2: the assistant's content is empty",
        ),
    ],
)
def test_a_bad_row_is_told_with_file_and_line(write_lines, row, message):
    good = {key: "fine" for key in row} if isinstance(row, dict) else {"text": "fine"}
    if "messages" in good:
        good = {"messages": [USER, ANSWER]}
    lines = [json.dumps(good)] * 4 if message.startswith("'") else []
    path = write_lines("a.jsonl", *lines, json.dumps(row))
    with pytest.raises(GraftError) as caught:
        read_rows(path)
    assert f"{path}:{len(lines) + 1}: {message}" in str(caught.value)


def test_all_bad_rows_are_told_at_once(write_lines):
    path = write_lines(
        "a.jsonl", '{"text": "a"}', '{"text": ""}', "{oops", "[]", '{"prompt": "a"}', '{"text": 1}'
    )
    with pytest.raises(GraftError) as caught:
        read_rows(path)
    message = str(caught.value)
    assert "5 problems" in message
    assert all(f"{path}:{line}: " in message for line in (2, 3, 4, 5, 6))
    assert f"{path}:1: " not in message


def test_a_mixture_of_kinds_names_the_rows_that_differ(write_lines):
    prompt = json.dumps({"prompt": "a", "completion": "b"})
    path = write_lines("a.jsonl", '{"text": "a"}', prompt, '{"text": "a"}', prompt)
    with pytest.raises(GraftError) as caught:
        read_rows(path)
    for line in (2, 4):
        expected = f"{path}:{line}: a prompt row, but {path}:1 is a text row"
        assert expected in str(caught.value)


@pytest.mark.parametrize(("bad", "listed", "rest"), [(20, 20, ""), (25, 20, "and 5 more")])
def test_twenty_problems_are_listed_and_the_rest_counted(write_lines, bad, listed, rest):
    path = write_lines("a.jsonl", *['{"text": ""}'] * bad, '{"text": "fine"}')
    with pytest.raises(GraftError) as caught:
        read_rows(path)
    message = str(caught.value)
    assert f"{bad} problems" in message
    assert message.count("is empty") == listed
    assert message.endswith(rest)
    assert ("more" in message) == bool(rest)


def test_one_bad_row_of_a_thousand(write_lines):
    lines = ['{"text": "fine"}'] * 1000
    lines[616] = '{"txet": "fine"}'
    path = write_lines("a.jsonl", *lines)
    with pytest.raises(GraftError, match=f"bad rows: {path}:617: found keys txet; accepted keys"):
        read_rows(path)
