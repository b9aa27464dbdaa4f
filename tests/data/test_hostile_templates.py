"""Templates that would take all time or memory are ended; all others render to the letter."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from graft.data import templates
from graft.data.chat import DEFAULT_CHAT_TEMPLATE, chat_prompt, render_chat
from graft.data.encode import encode_rows
from graft.data.rows import Row, Rows
from graft.data.templates import Renderer, render_within_bounds, rendering, rendering_here
from graft.errors import GraftError

CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
TALK = [
    {"role": "system", "content": "  Be  brief.\n"},
    {
        "role": "user",
        "content": "<b>ü</b> 'quoted' {{ x }}",
        "name": "\u2028",
        "extra": [1, 2.5, None],
    },
    {"role": "assistant", "content": "fine", "reasoning": "so", "tool_calls": [CALL]},
    {"role": "user", "content": "more"},
]
HONEST = {
    "default": DEFAULT_CHAT_TEMPLATE,
    "specials": "{{ bos_token }}{% for m in messages %}{{ m.content|trim~eos_token }}{% endfor %}",
    "json": "{{ messages | tojson }} {{ messages[-1]|tojson(indent=2) }} {{ tools }}{{ unknown }}",
    "namespace": (
        "{%- set ns = namespace(last=0, text='') -%}\n"
        "{%- for m in messages %}\n    {%- if m.role == 'user' %}\n"
        "        {%- set ns.last = loop.index0 %}\n    {%- endif %}\n{%- endfor %}\n"
        "{% for m in messages[::-1] %}{% if loop.index0 > ns.last %}{% break %}{% endif %}"
        "{{ m['role'].upper() ~ ': ' + m['content'].split()[0] }}\n{% endfor %}"
    ),
    "macro": (
        "{% macro turn(m) %}<{{ m.role }}>{{ caller() }}</{{ m.role }}>{% endmacro %}"
        "{% for m in messages %}{% call turn(m) %}{{ m.content | replace('e', 'E') }}{% endcall %}"
        "{% endfor %}{{ ['%s-%s' | format(1, 2), '{:>5}'.format('x')] | join(',') }}"
    ),
    "generation": (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{{ m.reasoning_content }}{{ m.thinking }}{% endfor %}"
        "{% if add_generation_prompt is defined and add_generation_prompt %}A:{% endif %}"
    ),
    "date": "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.extra }}{% endfor %}",
}


def renderings(renderer: Renderer, request) -> list[str]:
    messages, beginnings = request
    renderer.begin(len(str(messages)))
    return [renderer.render(messages[:count], ask=ask) for count, ask in beginnings]


@pytest.mark.parametrize("template", HONEST.values(), ids=HONEST)
def test_honest_templates_render_as_transformers_renders_them(build_tokenizer, template) -> None:
    tokenizer = build_tokenizer(chat_template=template)
    beginnings = [(count, ask) for count in (1, 2, 4) for ask in (True, False)]
    expected = [
        tokenizer.apply_chat_template(TALK[:count], tokenize=False, add_generation_prompt=ask)
        for count, ask in beginnings
    ]
    assert render_within_bounds(tokenizer, None, renderings, [TALK, beginnings]) == expected
    assert all(expected)


def test_a_tokenizer_that_changes_is_rendered_as_it_is(build_tokenizer) -> None:
    tokenizer = build_tokenizer(chat_template="{{ eos_token }}")
    assert chat_prompt(TALK, tokenizer) == "</s>"
    tokenizer.eos_token = "<|im_end|>"
    assert chat_prompt(TALK, tokenizer) == "<|im_end|>"
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    assert chat_prompt(TALK, tokenizer) == "a"
    tokenizer.chat_template = None
    assert chat_prompt(TALK, tokenizer).startswith("### system:")


def test_values_that_are_no_json_are_shown_as_transformers_shows_them(build_tokenizer) -> None:
    tokenizer = build_tokenizer(chat_template="{{ messages[0].image }}")
    messages = [{"role": "user", "content": "a", "image": b"1"}]
    shown = tokenizer.apply_chat_template(messages, tokenize=False)
    assert chat_prompt(messages, tokenizer) == shown == "<bytes>"


ENDLESS = {
    "loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
        "{% endfor %}{% endfor %}{% endfor %}"
    ),
    "power": "{{ 9 ** (10 ** 9) }}",
    "multiplied": "{{ 'x' * 10 ** 10 }}",
    "padded": "{{ 'x' | center(10 ** 10) }}",
    "formatted": "{{ '%99999999999d' | format(1) }}",
    "doubled": (
        "{% set ns = namespace(t='x' * 1000) %}{% for a in range(60) %}"
        "{% set ns.t = ns.t ~ ns.t %}{% endfor %}"
    ),
    "replaced": "{% set t = 'x' * 100000 %}{{ t | replace('x', t) }}",
    "macro": "{% macro m(n) %}{{ m(n) ~ m(n) }}{% endmacro %}{{ m(1) }}",
}


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_a_template_that_takes_all_is_ended(build_tokenizer, template, monkeypatch) -> None:
    monkeypatch.setenv("GRAFT_BOUNDS", "0.2")
    begin = time.monotonic()
    tokenizer = build_tokenizer(chat_template=template)
    with pytest.raises(
        GraftError, match="takes more than 1 s|fails on the messages|refuses"
    ) as told:
        chat_prompt(TALK, tokenizer)
    assert time.monotonic() - begin < 8
    assert len(str(told.value)) < 1200
    # The next conversation has a process of its own again.
    assert chat_prompt(TALK, build_tokenizer()).startswith("### system:")


def test_a_template_that_was_ended_is_not_tried_again(build_tokenizer, monkeypatch) -> None:
    monkeypatch.setenv("GRAFT_BOUNDS", "0.2")
    monkeypatch.setattr(templates, "_EXHAUSTED", {})
    tokenizer = build_tokenizer(chat_template=ENDLESS["loops"])
    rows = [Row(f"a:{n}", {"messages": TALK[1:3]}) for n in range(100)]
    begin = time.monotonic()
    with pytest.raises(GraftError, match="a:0: the chat template takes(.*\n)*.*a:1: .* not tried"):
        encode_rows(Rows("messages", rows, ()), tokenizer, max_length=9, eos=True, separator="")
    assert time.monotonic() - begin < 8


def test_a_template_that_writes_without_end_is_told(build_tokenizer, monkeypatch) -> None:
    monkeypatch.setenv("GRAFT_BOUNDS", "0.01")
    tokenizer = build_tokenizer(chat_template="{% for a in range(99999) %}xx{% endfor %}")
    with pytest.raises(GraftError, match="writes more than 167,772 characters"):
        chat_prompt(TALK, tokenizer)
    assert chat_prompt(TALK, build_tokenizer(chat_template="{{ 'x' * 99 }}")) == "x" * 99


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses the messages: roles must alte"),
        ("{{ raise_exception('\x1b[31m' * 9999) }}", r"refuses the messages: \\x1b\[31m"),
        ("{% for %}", "refuses the messages: Expected an expression"),
        ("{{ 1 / 0 }}", "fails on the messages: ZeroDivisionError"),
        ("{{ messages[0] + 1 }}", "fails on the messages: TypeError"),
        ("{{ 'x'.index('y') }}", "fails on the messages: ValueError"),
        ("{{ messages.append(1) }}", "refuses the messages: "),
        ("{{ ''.__class__.__mro__ }}", "refuses the messages: "),
        ("{{ unknown.attribute }}", "refuses the messages: 'unknown' is undefined"),
        ("{{ range(10 ** 9) }}", "fails on the messages: OverflowError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails on the messages: Recursion"),
        ("{{ " + "(" * 500 + "1" + ")" * 500 + " }}", "(fails on|refuses) the messages"),
        ("{% include 'x' %}", "fails on the messages: TypeError"),
        (["no", "text"], "fails on the messages"),
        ({"one": "a"}, r"is one of several \(one\), none of which is called 'default'; choose one"),
    ],
)
def test_whatever_a_template_raises_is_told(build_tokenizer, template, message) -> None:
    tokenizer = build_tokenizer(chat_template=template)
    with pytest.raises(GraftError, match=f"^the chat template {message}") as told:
        chat_prompt(TALK, tokenizer)
    assert len(str(told.value)) < 5000


def test_half_a_surrogate_pair_in_a_rendered_text_is_told(build_tokenizer) -> None:
    tokenizer = build_tokenizer(chat_template="{{ messages[0].name }}")
    with pytest.raises(GraftError, match=r"message 1: 'name' holds half of a surrogate pair"):
        chat_prompt([{"role": "user", "content": "a", "name": "\ud83d"}], tokenizer)


def test_messages_that_are_nested_too_deeply_are_told(build_tokenizer) -> None:
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(GraftError, match="the messages are no JSON: maximum recursion"):
        chat_prompt([{"role": "user", "content": "a", "x": deep}], build_tokenizer())


COUNTING = (
    "{% for m in messages %}{{ m.role }} {{ loop.index }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant {{ messages | length + 1 }}: {% endif %}"
)
"""Each answer stands apart from the others, so that each is rendered for itself."""


def test_a_row_of_many_turns_is_bounded(build_tokenizer, monkeypatch) -> None:
    monkeypatch.setenv("GRAFT_BOUNDS", "0.2")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 5000
    begin = time.monotonic()
    with pytest.raises(GraftError, match="takes more than 1 s|writes more than"):
        render_chat(
            {"messages": turns},
            build_tokenizer(chat_template=COUNTING),
        )
    assert time.monotonic() - begin < 8


def test_a_long_row_is_refused_before_it_is_tokenized(tokenizer) -> None:
    rows = Rows("prompt", [Row("a:1", {"prompt": "", "completion": "x" * (2**22 + 1)})], ())
    with pytest.raises(GraftError, match=r"a:1: its text: 4,194,305 characters; at most 4,194,304"):
        encode_rows(rows, tokenizer, max_length=1024, eos=True, separator="\n")
    rows = Rows("text", [Row("a:1", {"text": "x" * (2**24 + 1)})], ())
    with pytest.raises(GraftError, match=r"a:1: its text: 16,777,217 characters; at most"):
        encode_rows(rows, tokenizer, max_length=1024, eos=True, separator="\n")


def test_the_process_ends_with_the_rendering_and_holds_no_file(build_tokenizer, tmp_path) -> None:
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    with rendering():
        assert chat_prompt(TALK, build_tokenizer())
        process = templates._APART[0].worker.process
        os.close(writer)
        assert os.read(reader, 1) == b""  # nobody else has the other end
        os.kill(process, 0)
    os.close(reader)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def forked(task) -> tuple[str, int]:
    """Return what a task returns in a forked process, and how that process ended."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            os.write(writer, str(task()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as told:
        text = told.read().decode()
    return text, os.waitpid(child, 0)[1]


def test_a_process_that_may_be_ended_renders_by_itself(build_tokenizer, monkeypatch) -> None:
    tokenizer = build_tokenizer(chat_template=HONEST["specials"])
    expected = chat_prompt(TALK, tokenizer)

    def task() -> str:
        rendering_here()
        monkeypatch.setattr("graft.data.worker.os.fork", None)
        assert chat_prompt(TALK, tokenizer) == expected
        failing = build_tokenizer(chat_template="{{ raise_exception('no') }}")
        with pytest.raises(GraftError, match="refuses the messages: no"):
            chat_prompt(TALK, failing)
        return chat_prompt(TALK, tokenizer)

    assert forked(task) == (expected, 0)


def test_a_process_that_renders_by_itself_is_ended_at_its_share(
    build_tokenizer, monkeypatch
) -> None:
    monkeypatch.setenv("GRAFT_BOUNDS", "0.2")
    tokenizer = build_tokenizer(chat_template=ENDLESS["loops"])

    def task() -> str:
        rendering_here()
        return chat_prompt(TALK, tokenizer)

    assert forked(task) == ("", signal.SIGPROF)


def test_where_no_process_can_be_forked_it_is_told(build_tokenizer, monkeypatch) -> None:
    def fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("graft.data.worker.os.fork", fork)
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with rendering(), pytest.raises(GraftError, match="process of its own: Resource temporarily"):
        chat_prompt(TALK, build_tokenizer())
    if descriptors:
        assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_a_request_is_one_line(build_tokenizer) -> None:
    tokenizer = build_tokenizer(chat_template="{{ messages[0].content }}")
    content = "a\nb\r\n\u2028\u0085\0c" + json.dumps("\n")
    assert chat_prompt([{"role": "user", "content": content}], tokenizer) == content
