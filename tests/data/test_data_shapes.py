"""Shapes of rows: what each says of itself, and one that is added from outside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from graft.data.config import DataConfig
from graft.data.encode import encode_chat, encode_prompt
from graft.data.load import load_train_and_eval
from graft.data.rows import read_rows
from graft.data.shapes.base import AnsweredShape, Rendered, Tokenizer
from graft.data.shapes.registry import CHAT, PLAIN, SHAPES
from graft.errors import GraftError

ROWS: dict[str, dict[str, Any]] = {
    "text": {"text": "a"},
    "prompt": {"prompt": "p", "completion": "c"},
    "instruction": {"instruction": "i", "input": "n", "output": "o"},
    "messages": {
        "messages": [
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": "v"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "w"},
        ]
    },
}
ROWS["prompt_pair"] = {**ROWS["prompt"], "rejected": {"prompt": "p", "completion": "d"}}
ROWS["instruction_pair"] = {
    **ROWS["instruction"],
    "rejected": {"instruction": "i", "input": "n", "output": "d"},
}
ROWS["messages_pair"] = {
    **ROWS["messages"],
    "rejected": {
        "messages": [
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "d"},
        ]
    },
}
ROWS["prompt_labelled"] = {**ROWS["prompt"], "label": True}
ROWS["messages_labelled"] = {**ROWS["messages"], "label": False}


class QuestionShape(AnsweredShape):
    """{"question": ..., "answer": ..., "weight": a number that need not be there}."""

    name = "question"
    required = ("question", "answer")
    optional = ("weight",)
    answer = "answer"

    def fields(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().fields(row), "weight": row.get("weight", 1.0)}

    def problems(self, fields: Mapping[str, Any]) -> list[str]:
        texts = {key: fields[key] for key in self.required}
        found = super().problems(texts)
        if not isinstance(fields["weight"], int | float):
            found.append(f"'weight' is {fields['weight']!r}; expected a number")
        return found

    def render(self, fields: Mapping[str, Any], tokenizer: Tokenizer, separator: str) -> Rendered:
        whole = super().render(fields, tokenizer, separator)
        return Rendered(whole.text, whole.spans, {"weight": fields["weight"]})

    def render_prompt(self, fields: Mapping[str, Any], tokenizer: Tokenizer, separator: str) -> str:
        return f"Q: {fields['question']}\nA: "


@pytest.fixture
def question() -> Iterator[None]:
    SHAPES.add("question", QuestionShape())
    yield
    SHAPES.remove("question")


def test_every_shape_says_what_is_needed_of_it(tokenizer, write_lines):
    assert set(ROWS) == set(SHAPES), "add a row of the new shape to ROWS"
    for name, row in ROWS.items():
        shape = SHAPES[name]
        assert shape.name == name
        assert not set(shape.may_be_empty) - set(shape.required)
        fields = shape.fields(row)
        assert shape.problems(fields) == []
        rendered = shape.render(fields, tokenizer, "\n")
        prompt = shape.prompt(fields, tokenizer, "\n")
        assert shape.has_prompts or not shape.continued_by_default
        if shape.has_prompts:
            continued = shape.continuation(fields)
            before = shape.prompt(continued.fields, tokenizer, "\n")
            last = rendered.spans[-1]
            assert rendered.text[: last[0]] == before
            assert rendered.text[slice(*last)].startswith(continued.reference)
            assert continued.text in before
        else:
            assert rendered.text == prompt


def test_a_comparison_shows_what_differs_from_row_to_row():
    shown = {
        name: SHAPES[name].continuation(SHAPES[name].fields(row))[1:]
        for name, row in ROWS.items()
        if SHAPES[name].has_prompts
    }
    plain = {"prompt": ("p", "c"), "instruction": ("n", "o"), "messages": ("v", "b")}
    assert shown == {name: plain[name.partition("_")[0]] for name in shown}
    bare = {"instruction": "i", "input": "", "output": "o"}
    assert SHAPES["instruction"].continuation(bare).text == "i"


def test_prompts_to_unknown_models(tokenizer):
    assert not SHAPES[PLAIN].is_conversation
    assert SHAPES[PLAIN].prompt(" as it is", tokenizer, "~") == " as it is"
    assert SHAPES[CHAT].is_conversation
    talk = ROWS["messages"]["messages"]
    assert encode_chat(talk, tokenizer) == encode_prompt(CHAT, {CHAT: talk}, tokenizer, "~")


@pytest.mark.usefixtures("question")
def test_a_shape_is_added_from_outside(tokenizer, write_lines):
    path = write_lines(
        "rows.jsonl",
        '{"question": "a", "answer": "b"}',
        '{"question": "c", "answer": "d", "weight": 0.5, "more": 1}',
        '{"question": "e", "answer": "f"}',
    )
    config = DataConfig(data=path, max_length=32)
    train, held_out = load_train_and_eval(config, tokenizer, None, 0)
    assert train.kind == held_out.kind == "question"
    assert train.ignored_keys == ("more",)
    examples = sorted(train.examples + held_out.examples, key=lambda example: example.where)
    assert [example.values for example in examples] == [
        {"weight": 1.0},
        {"weight": 0.5},
        {"weight": 1.0},
    ]
    prompt = encode_prompt("question", "a", tokenizer, "\n")
    assert examples[0].input_ids[: len(prompt)] == prompt
    assert tokenizer.decode(examples[0].input_ids) == "<s>Q: a\nA: b</s>"
    assert examples[0].targets == [False] * len(prompt) + [True, True], "b and the end"


@pytest.mark.usefixtures("question")
def test_messages_name_the_shape_that_was_added(tokenizer, write_lines):
    path = write_lines(
        "rows.jsonl",
        '{"question": "a", "answer": "b"}',
        '{"question": "a", "answer": " ", "weight": "heavy"}',
        '{"answer": "b"}',
        '{"text": "a"}',
        '{"question": "a", "answer": "b", "text": "c"}',
    )
    with pytest.raises(GraftError) as told:
        read_rows(path)
    lines = str(told.value).splitlines()
    assert lines[1:] == [
        f"  - {path}:2: 'answer' is empty",
        f"  - {path}:2: 'weight' is 'heavy'; expected a number",
        f"  - {path}:3: found keys answer; accepted keys of a row: text; or prompt, completion; "
        "or instruction, output and perhaps input; or messages and perhaps tools, functions, "
        "chat_template_kwargs; or question, answer and perhaps weight",
        f"  - {path}:4: a text row, but {path}:1 is a question row; a file holds one kind of "
        "rows, so split it",
    ]
    with pytest.raises(GraftError, match="of kind question needs the key 'question'; found keys a"):
        encode_prompt("question", {"a": "b"}, tokenizer, "\n")


def test_an_unknown_shape_is_refused(tokenizer):
    with pytest.raises(GraftError, match="unknown kind of rows 'promt'.*prompt"):
        encode_prompt("promt", "a", tokenizer, "\n")
