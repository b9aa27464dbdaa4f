"""Rows as data sets lay them out, and what each becomes; written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from graft.data.rows import Reading, read_rows
from graft.data.shapes.turns import as_messages
from graft.errors import GraftError

ASK = {"role": "user", "content": "q"}
SAY = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
TALK = {"messages": [ASK, SAY]}
UNTRAINED = {**SAY, "weight": 0}


def _calls(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": who, "value": what} for who, what in turns]


LAYOUTS: list[tuple[str, dict[str, Any], str, dict[str, Any], tuple[str, ...]]] = [
    ("sharegpt", {"conversations": _calls(("human", "q"), ("gpt", "a"))}, "messages", TALK, ()),
    ("named so", {"conversation": _calls(("User", "q"), ("chatgpt", "a"))}, "messages", TALK, ()),
    (
        "system beside",
        {"conversations": _calls(("human", "q"), ("gpt", "a")), "system": "s"},
        "messages",
        {"messages": [SYSTEM, ASK, SAY]},
        (),
    ),
    (
        "no system beside",
        {"conversations": _calls(("human", "q"), ("gpt", "a")), "system": "", "id": 3},
        "messages",
        TALK,
        ("id",),
    ),
    (
        "a turn's own keys stay",
        {
            "conversations": [
                *_calls(("human", "q")),
                {"from": "gpt", "value": "a", "weight": 0},
                *_calls(("human", "q"), ("gpt", "a")),
            ]
        },
        "messages",
        {"messages": [ASK, UNTRAINED, ASK, SAY]},
        (),
    ),
    ("role, content", {"dialogue": [ASK, SAY]}, "messages", TALK, ()),
    ("gpt as a role", {"messages": [ASK, {**SAY, "role": "gpt"}]}, "messages", TALK, ()),
    ("texts in turn", {"dialog": ["q", "a"]}, "messages", TALK, ()),
    ("exchanges", {"conversation": [{"human": "q", "assistant": "a"}]}, "messages", TALK, ()),
    ("JSON in a cell", {"messages": json.dumps([ASK, SAY])}, "messages", TALK, ()),
    (
        "TRL",
        {"prompt": [ASK, SAY, ASK], "completion": [SAY]},
        "messages",
        {"messages": [ASK, UNTRAINED, ASK, SAY]},
        (),
    ),
    ("TRL, one text", {"prompt": "q", "completion": [SAY]}, "messages", TALK, ()),
    ("messages first", {"prompt": "q", "messages": [ASK, SAY]}, "messages", TALK, ("prompt",)),
    (
        "Alpaca with text",
        {"instruction": "i", "input": "n", "output": "o", "text": "t"},
        "instruction",
        {"instruction": "i", "input": "n", "output": "o"},
        ("text",),
    ),
    (
        "Dolly",
        {"instruction": "i", "context": "n", "response": "o", "category": "c"},
        "instruction",
        {"instruction": "i", "input": "n", "output": "o"},
        ("category",),
    ),
    (
        "history",
        {"instruction": "q", "input": "", "output": "a", "system": "s", "history": [["q", "a"]]},
        "messages",
        {"messages": [SYSTEM, ASK, SAY, ASK, SAY]},
        (),
    ),
    (
        "OpenOrca",
        {"id": 1, "system_prompt": "s", "question": "q", "response": "a"},
        "messages",
        {"messages": [SYSTEM, ASK, SAY]},
        ("id",),
    ),
    ("gsm8k", {"question": "q", "answer": "a"}, "prompt", {"prompt": "q", "completion": "a"}, ()),
    ("E2E", {"mr": "q", "ref": "a"}, "prompt", {"prompt": "q", "completion": "a"}, ()),
    ("pairs", {"input": "q", "output": "a"}, "prompt", {"prompt": "q", "completion": "a"}, ()),
    (
        "preference",
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        "prompt",
        {"prompt": "q", "completion": "a"},
        (),
    ),
    (
        "preferred conversation",
        {"chosen": [ASK, SAY, ASK, SAY], "rejected": [ASK, SAY, ASK, {**SAY, "content": "b"}]},
        "messages",
        {"messages": [ASK, UNTRAINED, ASK, SAY]},
        (),
    ),
    (
        "UltraFeedback",
        {"prompt": "q", "chosen": [ASK, SAY], "rejected": [ASK, ASK], "messages": [ASK, SAY]},
        "messages",
        TALK,
        ("messages",),
    ),
    (
        "LLaMA-Factory's preference",
        {
            "conversations": _calls(("human", "q")),
            "chosen": _calls(("gpt", "a"))[0],
            "rejected": _calls(("gpt", "b"))[0],
        },
        "messages",
        TALK,
        (),
    ),
    (
        "transcripts",
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        "messages",
        TALK,
        (),
    ),
    (
        "KTO",
        {"prompt": "q", "completion": "a", "label": True},
        "prompt",
        {"prompt": "q", "completion": "a"},
        (),
    ),
    (
        "a label that judges nothing",
        {"prompt": "q", "completion": "a", "label": "sports"},
        "prompt",
        {"prompt": "q", "completion": "a"},
        ("label",),
    ),
    ("text", {"text": "t", "label": False}, "text", {"text": "t"}, ("label",)),
]


@pytest.mark.parametrize(
    ("row", "kind", "fields", "ignored"),
    [one[1:] for one in LAYOUTS],
    ids=[one[0] for one in LAYOUTS],
)
def test_rows_of_a_layout_are_recognised(write_lines, row, kind, fields, ignored):
    rows = read_rows(write_lines("a.jsonl", json.dumps(row)))
    assert (rows.kind, rows.ignored_keys) == (kind, ignored)
    (found,) = rows.rows
    read = {key: value for key, value in found.fields.items() if value not in ("", None)}
    assert read == {key: value for key, value in fields.items() if value != ""}


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_a_table_of_turns_is_read_as_a_list_of_them(write_lines, key):
    table = {"from": ["human", "gpt"], "value": ["q", "a"]}
    found = read_rows(write_lines("a.jsonl", json.dumps({key: table})))
    assert found.rows[0].fields == {"messages": [ASK, SAY]}


def test_other_keys_of_a_turn_are_kept():
    turns = [{"human": "q", "assistant": "a", "weight": 0}, {"from": "human", "value": "r", "n": 1}]
    assert as_messages(turns[:1]) == [ASK, {**SAY, "weight": 0}]
    assert as_messages(turns[1:]) == [{"role": "user", "content": "r", "n": 1}]


def test_calls_of_functions_and_their_answers_become_messages():
    call = json.dumps({"name": "f", "arguments": {"x": 1}})
    turns = _calls(("human", "q"), ("function_call", call), ("observation", "o"), ("gpt", "a"))
    assert as_messages(turns) == [
        ASK,
        {"role": "assistant", "content": "", "tool_calls": [json.loads(call)]},
        {"role": "tool", "content": "o"},
        SAY,
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"conversations": _calls(("human", "q"), ("function_call", "oops"))},
            "message 2: a call of a function is 'oops'; expected JSON",
        ),
        (
            {"conversations": _calls(("human", "q"), ("gpt", "a")), "tools": "[oops"},
            "'tools' is a string that is no JSON",
        ),
        ({"messages": [SYSTEM, ASK, SAY], "system": "t"}, "'system' is another text than"),
        ({"instruction": "q", "output": "a", "history": "h"}, "'history' is no list of pairs"),
        (
            {"instruction": "q", "output": "a", "history": [["a", "b", "c"]]},
            "'history' is no list of pairs",
        ),
        ({"messages": [ASK, SAY], "system": ["s"]}, "'system' is a list; expected a string"),
        ({"question": "q", "answers": {"text": ["a"]}}, "pass --columns prompt=question"),
        ({"Question": "q", "Answer": "a"}, "pass --columns prompt=Question completion=Answer"),
        ({"my question": "q", "reply": "a"}, "--columns 'prompt=my question' completion=reply"),
        ({"content": "t", "stars": 3}, "pass --columns text=content"),
        ({"log": [ASK, SAY]}, "pass --columns messages=log"),
        ({"data": {"talk": [ASK, SAY]}}, "pass --columns messages=data.talk"),
        (
            {"context": "c", "question": "q", "answers": {"text": ["a"]}},
            "pass --columns instruction=question input=context output=answers.text.0",
        ),
        ({"document": "d", "summary": "s"}, "pass --columns prompt=document completion=summary"),
        ({"old": "d", "new": "s"}, "as in --columns prompt=old completion=new, or --columns text="),
        ({"conversations": None}, "of which 'conversations' is null, and no conversation"),
        ({"question": "q", "answer": 42}, "'completion' (column 'answer') is of type int"),
        ({"instruction": "q", "response": ""}, "'output' (column 'response') is empty"),
        ({"prompt": "q", "completion": ["a"]}, "'completion' is a list; expected a string"),
        ({"messages": str([ASK])}, "'messages' is a string; expected a list of objects, or JSON"),
        ({"conversations": []}, "'messages' (column 'conversations') is an empty list"),
        ({"chosen": [ASK, SAY], "rejected": [ASK, SAY]}, "'chosen' has nothing that 'rejected'"),
        (
            {"conversations": _calls(("human", "q"), ("tool_call", '{"name": "f", "args": {}}'))},
            "message 2: tool call 1: its arguments stand under 'args'; name that key 'arguments'",
        ),
        ({"a": "x", "b": "y", "c": "z"}, "name the columns, as in --columns prompt=COLUMN"),
        ([{"text": "t"}], "a list; expected an object; if those are its rows, name the file .json"),
        ([ASK, SAY], 'a list; expected an object; make it {"messages": [...]}'),
    ],
)
def test_what_cannot_be_read_is_told_with_the_remedy(write_lines, row, message):
    with pytest.raises(GraftError) as caught:
        read_rows(write_lines("a.jsonl", json.dumps(row)))
    assert message in str(caught.value)
    assert "a.jsonl:1: " in str(caught.value)


def test_the_columns_that_a_message_names_are_read(write_lines):
    path = write_lines("a.jsonl", json.dumps({"qa": [{"Question": "q", "Answer": "a"}]}))
    with pytest.raises(GraftError) as caught:
        read_rows(path)
    words = tuple(str(caught.value).rpartition("--columns ")[2].split())
    rows = read_rows(path, Reading(columns=words))
    assert rows.rows[0].fields == {"prompt": "q", "completion": "a"}


def test_answers_that_are_not_wanted_are_left_out_and_counted(write_lines):
    rows = [{"messages": [ASK, SAY], "label": n % 3 > 0} for n in range(9)]
    found = read_rows(write_lines("a.jsonl", *map(json.dumps, rows)))
    assert len(found.rows) == 6
    assert found.notes == (
        "rows in which 'label' is false are left out, as their answers are not wanted",
        "3 rows are left out",
    )
    none = [{"messages": [ASK, SAY], "label": False}] * 2
    with pytest.raises(GraftError, match="all of its rows are left out"):
        read_rows(write_lines("b.jsonl", *map(json.dumps, none)))


def test_what_is_made_of_preferences_is_said(write_lines):
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    (note,) = read_rows(write_lines("a.jsonl", json.dumps(row))).notes
    assert note == "rows of preferences: 'chosen' is trained as the answer, 'rejected' is not"


def test_rows_without_a_history_stand_among_those_with_one(write_lines):
    rows = [
        {"instruction": "q", "output": "a", "history": [["q", "a"]]},
        {"instruction": "q", "output": "a"},
    ]
    found = read_rows(write_lines("a.jsonl", *map(json.dumps, rows)))
    assert [len(row.fields["messages"]) for row in found.rows] == [4, 2]
    with pytest.raises(GraftError, match=":2: a messages row, but .*:1 is an instruction row"):
        read_rows(write_lines("b.jsonl", *map(json.dumps, rows[::-1])))


def test_how_a_row_may_look_is_said_once_for_a_file(write_lines):
    with pytest.raises(GraftError) as caught:
        read_rows(write_lines("a.jsonl", *['{"a": 1}'] * 9))
    assert str(caught.value).count("found keys a") == 9
    assert str(caught.value).count("accepted keys of a row") == 1


# --columns ----------------------------------------------------------------------------------------


def _read(write: Callable[..., str], row: dict[str, Any], *words: str) -> Any:
    return read_rows(write("a.jsonl", json.dumps(row)), Reading(columns=words))


def test_columns_are_named_anew(write_lines):
    row = {"q": {"text": "a"}, "answers": ["b", "c"], "text": "t", "prompt": "p"}
    rows = _read(write_lines, row, "prompt=q.text", "completion=answers.1")
    assert rows.kind == "prompt"
    assert rows.rows[0].fields == {"prompt": "a", "completion": "c"}
    assert rows.ignored_keys == ("text",)
    assert _read(write_lines, row, "text=prompt").rows[0].fields == {"text": "p"}
    renamed = _read(write_lines, {"instruction": "i", "reply": "o", "text": "t"}, "output=reply")
    assert renamed.rows[0].fields == {"instruction": "i", "input": "", "output": "o"}
    dotted = _read(write_lines, {"a.b": "t", "a": {"b": "u"}}, "text=a.b")
    assert dotted.rows[0].fields == {"text": "t"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prompt"], "--columns: 'prompt': expected KEY=COLUMN, as in prompt=question"),
        (["promt=a"], "no row has a key 'promt'; did you mean 'prompt'?"),
        (["text=a", "text=b"], "text is given twice"),
        (["text=a", "completion=b"], "no kind of rows has all of the keys text, completion"),
        (
            ["prompt=qestion", "completion=answer"],
            "--columns prompt=qestion: there is no column 'qestion'; did you mean 'question'? "
            "(there are: question, answer)",
        ),
    ],
)
def test_columns_that_mean_nothing_are_told(write_lines, words, message):
    with pytest.raises(GraftError) as caught:
        _read(write_lines, {"question": "q", "answer": "a"}, *words)
    assert message in str(caught.value)


def test_what_is_wrong_is_told_of_the_column_that_was_named(write_lines):
    with pytest.raises(GraftError, match=r":1: 'text' \(column 'q.body'\) is of type int"):
        _read(write_lines, {"q": {"body": 1}}, "text=q.body")


def test_a_column_that_one_row_lacks_is_a_problem_of_that_row(write_lines):
    path = write_lines("a.jsonl", '{"q": "a", "r": "b"}', '{"q": "a"}')
    with pytest.raises(GraftError, match=":2: --columns completion=r: there is no column 'r'"):
        read_rows(path, Reading(columns=("prompt=q", "completion=r")))
