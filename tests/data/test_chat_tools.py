"""Tools: OpenAI's shapes of calls and of tools, as each template renders them."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_families import ALL, CALLING, CHATML, QWEN2

from graft.data.encode import encode_prompt, encode_rows
from graft.data.rows import Row, Rows, read_rows
from graft.data.shapes.messages import MESSAGES
from graft.errors import GraftError

CALL = {"id": "abcdefghi", "type": "function"}
ARGUMENTS = {"town": "Oslo", "days": 2}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}
CALLS = {
    "qwen2": '<tool_call>\n{"name": "weather", "arguments": {"town": "Oslo", "days": 2}}\n'
    "</tool_call><|im_end|>",
    "qwen3": '<tool_call>\n{"name": "weather", "arguments": {"town": "Oslo", "days": 2}}\n'
    "</tool_call><|im_end|>",
    "llama3": '{"name": "weather", "parameters": {"town": "Oslo", "days": 2}}<|eot_id|>',
    "mistral": '[TOOL_CALLS] [{"name": "weather", "arguments": {"town": "Oslo", "days": 2}, '
    '"id": "abcdefghi"}]</s>',
    "deepseek": '<call>weather\n```json\n{"town": "Oslo", "days": 2}\n```</call><end>',
    "items": "<call>weather<town=Oslo><days=2></>",
    None: '<tool_call>\n{"name": "weather", "arguments": {"town": "Oslo", "days": 2}}\n'
    "</tool_call></s>",
}


def talk(said: dict, arguments: object = ARGUMENTS) -> list[dict]:
    call = {**CALL, "function": {"name": "weather", "arguments": arguments}}
    return [
        {"role": "user", "content": "Weather in Oslo?"},
        {"role": "assistant", **said, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
    ]


def rendered(fields, tokenizer):
    assert MESSAGES.problems(fields) == []
    return MESSAGES.render(fields, tokenizer, "")


def trained(found) -> list[str]:
    return [found.text[start:end] for start, end in found.spans]


@pytest.mark.parametrize("name", [*CALLING, None])
def test_a_call_is_rendered_alike_in_all_of_its_shapes(build_tokenizer, name) -> None:
    tokenizer = build_tokenizer(chat_template=ALL[name] if name else None)
    texts = json.dumps(ARGUMENTS)
    shapes = [
        talk({"content": None}, texts),
        talk({"content": ""}, ARGUMENTS),
        talk({}, json.dumps(ARGUMENTS, indent=2)),
        talk({"content": None, "refusal": None, "function_call": None}),
    ]
    found = [rendered({"messages": messages, "tools": [TOOL]}, tokenizer) for messages in shapes]
    assert all(one == found[0] for one in found)
    assert trained(found[0])[0] == CALLS[name]
    assert "It rains." in trained(found[0])[-1]
    assert "rain" in found[0].text[: found[0].spans[-1][0]]


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama3", "mistral", None])
@pytest.mark.parametrize("as_text", [False, True])
def test_tools_of_a_row_stand_in_the_prompt(build_tokenizer, name, as_text) -> None:
    tokenizer = build_tokenizer(chat_template=ALL[name] if name else None)
    tools = json.dumps([TOOL]) if as_text else [TOOL]
    fields = {"messages": talk({"content": None}), "tools": tools}
    found = rendered(fields, tokenizer)
    at = found.text.index('"properties"')
    assert at < found.spans[0][0]
    assert found.text.count('"properties"') == 1
    assert not any("'tools'" in remark for remark in found.remarks)
    # Generation is asked with the same tools.
    prompt = encode_prompt(
        "messages", {**fields, "messages": fields["messages"][:1]}, tokenizer, ""
    )
    rows = Rows("messages", [Row("a:1", fields)], ())
    ids = (
        encode_rows(rows, tokenizer, max_length=9999, eos=True, separator="").examples[0].input_ids
    )
    assert list(ids[: len(prompt)]) == prompt


def test_former_functions_are_tools(build_tokenizer) -> None:
    tokenizer = build_tokenizer(chat_template=QWEN2)
    function = TOOL["function"]
    former = [
        {"role": "user", "content": "Weather in Oslo?"},
        {
            "role": "assistant",
            "content": None,
            "function_call": {"name": "weather", "arguments": json.dumps(ARGUMENTS)},
        },
        {"role": "function", "name": "weather", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
    ]
    today = talk({"content": None})
    for fields in (
        {"messages": former, "functions": [function]},
        {"messages": former, "tools": [function]},
        {"messages": former, "tools": [json.dumps(TOOL)]},
    ):
        found = rendered(fields, tokenizer)
        assert found.text == rendered({"messages": today, "tools": [TOOL]}, tokenizer).text
    flat = talk({})
    flat[1]["tool_calls"] = [{"name": "weather", "arguments": ARGUMENTS}]
    assert rendered({"messages": flat, "tools": [TOOL]}, tokenizer).text == found.text


@pytest.mark.parametrize("empty", ["", None, [], "[]", "null"])
def test_no_tools_are_none(build_tokenizer, empty) -> None:
    tokenizer = build_tokenizer(chat_template=QWEN2)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    found = rendered({"messages": messages, "tools": empty, "functions": empty}, tokenizer)
    assert found.text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"


def bad_call(call: object) -> dict:
    return {"messages": [*talk({})[:1], {"role": "assistant", "tool_calls": call}]}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (
            bad_call([{"function": {"name": "f", "arguments": "{'town': 1}"}}]),
            "message 2: tool call 1: 'arguments' is a string that is no JSON: Expecting property",
        ),
        (
            bad_call([{"function": {"name": "f", "arguments": "[1]"}}]),
            "message 2: tool call 1: 'arguments' is a list; expected an object",
        ),
        (
            bad_call([{"function": {"name": "f", "arguments": '{"x": NaN}'}}]),
            "message 2: tool call 1: 'arguments' is a string that is no JSON: NaN is no JSON",
        ),
        (
            bad_call([{"function": {"name": "f", "arguments": '{"x": 1, "x": 2}'}}]),
            "message 2: tool call 1: 'arguments' is a string that is no JSON: a key stands twice",
        ),
        (
            bad_call([{"name": "f", "arguments": '{"x":' * 200 + "1" + "}" * 200}]),
            "message 2: tool call 1: 'arguments' is nested more than 100 levels deep",
        ),
        (
            bad_call([{"name": "f", "arguments": {"x": float("inf")}}]),
            "message 2: tool call 1: 'arguments' holds a number that is no JSON",
        ),
        (
            bad_call([{"function": {"name": "f", "parameters": {"x": 1}}}]),
            "message 2: tool call 1: its arguments stand under 'parameters'",
        ),
        (bad_call([{"id": "x"}]), "message 2: tool call 1 names no function (keys: id)"),
        (bad_call(["f"]), "message 2: tool call 1 is a string; expected an object"),
        (bad_call({"name": "f"}), "message 2: 'tool_calls' is an object; expected a list"),
        (bad_call("f(x)"), "message 2: 'tool_calls' is a string that is no JSON"),
        ({"messages": talk({}), "tools": "f(x)"}, "'tools' is a string that is no JSON"),
        ({"messages": talk({}), "tools": {"a": 1}}, "'tools': tool 1 has no name (keys: a)"),
        ({"messages": talk({}), "tools": [1]}, "'tools': tool 1 is of type int; expected an"),
        ({"messages": talk({}), "tools": [{"x": 1}]}, "'tools': tool 1 has no name (keys: x)"),
        (
            {"messages": talk({}), "tools": [TOOL], "functions": [TOOL]},
            "'functions' and 'tools' are both given; keep 'tools'",
        ),
        (
            {"messages": talk({}), "chat_template_kwargs": {"tokenize": True}},
            "'chat_template_kwargs': 'tokenize' is no variable of a template",
        ),
        (
            {"messages": talk({}), "chat_template_kwargs": [1]},
            "'chat_template_kwargs' is a list; expected an object",
        ),
    ],
)
def test_what_is_wrong_with_tools_is_told(fields, problem) -> None:
    (found,) = MESSAGES.problems(fields)
    assert found.startswith(problem)


def test_a_call_that_the_template_drops_is_refused(build_tokenizer) -> None:
    tokenizer = build_tokenizer(chat_template=CHATML)
    with pytest.raises(
        GraftError, match="message 2: .* renders nothing of its 'tool_calls', so an"
    ):
        rendered({"messages": talk({"content": None})}, tokenizer)
    # With a content the row trains something, and what is dropped is told.
    found = rendered({"messages": talk({"content": "Let me look."})}, tokenizer)
    assert trained(found)[0] == "Let me look.<|im_end|>"
    dropped = "the chat template renders nothing of 'tool_calls' of assistant messages"
    assert dropped in found.remarks


def test_a_template_s_refusal_of_a_call_names_the_row(build_tokenizer, write_lines) -> None:
    messages = talk({})
    messages[1]["tool_calls"] *= 2
    path = write_lines("a.jsonl", json.dumps({"messages": messages}))
    tokenizer = build_tokenizer(chat_template=ALL["llama3"])
    with pytest.raises(GraftError, match=f"{path}:1: the chat template refuses.*one tool-call"):
        encode_rows(read_rows(path), tokenizer, max_length=99, eos=True, separator="")


@pytest.mark.parametrize(
    "spoilt",
    [
        "{{ m.content + 1 }}",
        "{{ m.tool_calls.x.y }}",
        "{{ 'x' | items | list }}",
        "{{ range(1, 2, 0) }}",
    ],
)
def test_whatever_a_template_raises_names_the_row(build_tokenizer, write_lines, spoilt) -> None:
    path = write_lines("a.jsonl", *[json.dumps({"messages": talk({"content": "x"})})] * 2)
    tokenizer = build_tokenizer(chat_template=CHATML.replace("{{ m.content }}", spoilt))
    with pytest.raises(
        GraftError, match=f"{path}:2: the chat template (fails on|refuses) the mess"
    ):
        encode_rows(read_rows(path), tokenizer, max_length=99, eos=True, separator="")


def test_nulls_that_arrow_adds_are_not_trained(build_tokenizer, tmp_path) -> None:
    tokenizer = build_tokenizer(chat_template=QWEN2)
    other = talk({}, {"a": 1, "b": {"c": [None, {"d": 2}]}})
    other[1]["tool_calls"][0]["function"]["name"] = "sum"
    rows = [
        {"messages": talk({"content": "Look."}), "tools": [TOOL]},
        {"messages": other, "tools": [{"type": "function", "function": {"name": "sum"}}]},
    ]
    lines, table = tmp_path / "rows.jsonl", tmp_path / "rows.parquet"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), table)
    options = {"max_length": 9999, "eos": True, "separator": ""}
    first, second = (
        [one.input_ids for one in encode_rows(read_rows(path), tokenizer, **options).examples]
        for path in (lines, table)
    )
    assert first == second
    # A null in JSON was written by somebody.
    meant = rendered({"messages": talk({}, {"town": None})}, tokenizer)
    assert '"arguments": {"town": null}' in trained(meant)[0]
