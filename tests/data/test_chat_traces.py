"""Nothing in a message is dropped in silence: what a template does not render is told."""

from __future__ import annotations

import pytest
from chat_families import CHATML, GEMMA, QWEN2, QWEN3

from graft.data.shapes.messages import MESSAGES

DROPS_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<A>{{ m.content }}<E>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<A>{% endif %}"
)
NAMES = CHATML.replace("m.role }}", "m.role ~ (' ' ~ (m.name | upper) if m.name else '') }}")
UPPER = CHATML.replace("m.content }}", "m.content | upper }}")
NUMBERS = CHATML.replace("m.content }}", "m.content }}{% if m.score %}!{% endif %}")
DEVELOPER = [{"role": "developer", "content": "S"}]
SYSTEM = [{"role": "system", "content": "Answer in French."}]
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Bonjour."}]


def with_keys(**keys) -> list[dict]:
    return [TALK[0], {**TALK[1], **keys}]


def untold(key: str) -> str:
    return f"the chat template renders nothing of {key!r} of assistant messages"


@pytest.mark.parametrize(
    ("template", "messages", "remarks"),
    [
        (CHATML, SYSTEM + TALK, []),
        (
            DROPS_SYSTEM,
            SYSTEM + TALK,
            ["system messages leave no trace in what the chat template renders"],
        ),
        (
            DROPS_SYSTEM,
            DEVELOPER + TALK,
            ["developer messages leave no trace in what the chat template renders"],
        ),
        (DROPS_SYSTEM, TALK, []),
        (UPPER, TALK, []),
        (None, SYSTEM + TALK, []),
        (CHATML, with_keys(name="Ann"), [untold("name")]),
        (NAMES, [{**TALK[0], "name": "Ann"}, TALK[1]], []),
        (CHATML, with_keys(reasoning_content="so"), [untold("reasoning_content")]),
        (QWEN3, with_keys(reasoning_content="so"), []),
        (QWEN3, with_keys(thinking="so"), []),
        (CHATML, with_keys(score=0.5, when={"x": [1, "y"]}), [untold("score"), untold("when")]),
        (NUMBERS, with_keys(score=0.5), []),
        (CHATML, with_keys(name="", refusal=None, annotations=[]), []),
        (QWEN2, with_keys(tool_call_id="x"), [untold("tool_call_id")]),
    ],
)
def test_what_leaves_no_trace_is_told(build_tokenizer, template, messages, remarks) -> None:
    tokenizer = build_tokenizer(chat_template=template)
    assert list(MESSAGES.render({"messages": messages}, tokenizer, "").remarks) == remarks


def test_a_thought_that_is_not_rendered_where_others_follow_is_told(build_tokenizer) -> None:
    tokenizer = build_tokenizer(chat_template=QWEN3)
    talk = with_keys(reasoning_content="so") + with_keys(reasoning_content="so")
    remarks = MESSAGES.render({"messages": talk}, tokenizer, "").remarks
    assert remarks[0] == untold("reasoning_content").replace("of assistant", "of some assistant")
    assert remarks[1].startswith("an answer before the last is trained without what the chat temp")


def test_a_template_that_looks_at_the_words_is_asked_all_the_same(build_tokenizer) -> None:
    picky = "{% if messages[0].content not in ('Hi', 'Ho') %}{{ raise_exception('?') }}{% endif %}"
    for template, told in ((picky + DROPS_SYSTEM, 1), (picky + CHATML, 0)):
        tokenizer = build_tokenizer(chat_template=template)
        talk = [*TALK, {"role": "system", "content": "x"}, *TALK]
        assert len(MESSAGES.render({"messages": talk}, tokenizer, "").remarks) == told


@pytest.mark.parametrize(
    ("template", "variables", "ending", "told"),
    [
        (QWEN3, {"enable_thinking": False}, "assistant\n<think>\n\n</think>\n\n", 1),
        (QWEN3, {"enable_thinking": True}, "assistant\n", 1),
        (QWEN3, '{"enable_thinking": false}', "assistant\n<think>\n\n</think>\n\n", 1),
        (CHATML, {"enable_thinking": False}, "assistant\n", 1),
        (CHATML, {}, "assistant\n", 0),
        (CHATML, None, "assistant\n", 0),
    ],
)
def test_variables_of_a_row_reach_its_template(
    build_tokenizer, template, variables, ending, told
) -> None:
    tokenizer = build_tokenizer(chat_template=template)
    fields = {"messages": TALK, "chat_template_kwargs": variables}
    assert MESSAGES.problems(fields) == []
    rendered = MESSAGES.render(fields, tokenizer, "")
    ((start, _),) = rendered.spans
    assert rendered.text[:start].endswith(ending)
    prompt = MESSAGES.opening({**fields, "messages": TALK[:1]}, tokenizer, "")
    assert rendered.text[:start] == prompt.text
    assert len(rendered.remarks) == told
    assert all("chat_template_kwargs" in remark for remark in rendered.remarks)


def test_tools_that_are_not_rendered_are_told(build_tokenizer) -> None:
    tools = [{"name": "f", "parameters": {}}]
    for template, told in ((CHATML, True), (QWEN2, False), (None, False), (GEMMA, True)):
        tokenizer = build_tokenizer(chat_template=template)
        remarks = MESSAGES.render({"messages": TALK, "tools": tools}, tokenizer, "").remarks
        assert remarks == ("the chat template renders nothing of 'tools'",) * told


def test_a_key_of_a_call_that_is_not_rendered_is_told(build_tokenizer) -> None:
    call = {"name": "f", "arguments": {"x": 1}, "strict": True, "mood": "glad", "x": None}
    messages = [TALK[0], {"role": "assistant", "tool_calls": [{"function": call}]}]
    found = MESSAGES.render({"messages": messages}, build_tokenizer(chat_template=QWEN2), "")
    assert found.remarks == tuple(
        untold(f"tool_calls.function.{key}") for key in ("strict", "mood")
    )
