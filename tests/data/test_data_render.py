"""Templates: trained spans of whole conversations, and prompts that equal training's prefix."""

from __future__ import annotations

import pytest

from graft.data.chat import DEFAULT_CHAT_TEMPLATE
from graft.data.render import render_prompt, render_row
from graft.data.rows import Row
from graft.data.shapes.base import Rendered
from graft.data.shapes.registry import SHAPES
from graft.errors import GraftError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ '' }}{% endif %}"
)
# No generation prompt of its own, the user's turn ends where the answer begins.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "[INST] {{ m['content'] | trim }} [/INST]{% else %} {{ m['content'] | trim }} {{ eos_token }}"
    "{% endif %}{% endfor %}"
)
# Writes an empty thought before the last answer only, as reasoning models' templates do.
THOUGHT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ '' }}{% endif %}"
)
FORCED_THOUGHT = CHATML.replace("{{ '' }}", "<think>\n{{ '' }}")
REWRITING = CHATML.replace(
    "m['content']",
    "m['content'][:1] if m['role'] == 'assistant' and not loop.last else m['content']",
)
REFUSING = "{{ raise_exception('roles must alternate') }}"

TALK = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "first"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "second"},
    {"role": "user", "content": "thanks"},
]


def segments(rendered) -> list[tuple[str, bool]]:
    pieces, reached = [], 0
    for start, end in rendered.spans:
        pieces += [(rendered.text[reached:start], False), (rendered.text[start:end], True)]
        reached = end
    assert rendered.text[reached:] == ""
    return pieces


def render(kind, fields, tokenizer, separator="\n"):
    return render_row(kind, Row("here", fields), tokenizer, separator)


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (
            None,
            TALK,
            [
                ("### system:\nS\n\n### user:\none\n\n### assistant:\n", False),
                ("first</s>", True),
                ("\n\n### user:\ntwo\n\n### assistant:\n", False),
                ("second</s>", True),
            ],
        ),
        (
            CHATML,
            TALK,
            [
                (
                    "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
                    "<|im_start|>assistant\n",
                    False,
                ),
                ("first<|im_end|>", True),
                ("\n<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n", False),
                ("second<|im_end|>", True),
            ],
        ),
        (
            BRACKETS,
            TALK[1:],
            [
                ("<s>[INST] one [/INST]", False),
                (" first </s>", True),
                ("[INST] two [/INST]", False),
                (" second </s>", True),
            ],
        ),
        (
            THOUGHT,
            TALK[1:],
            [
                ("<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n", False),
                ("first<|im_end|>", True),
                ("\n<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n", False),
                ("<think>\n\n</think>\n\nsecond<|im_end|>", True),
            ],
        ),
    ],
    ids=["default", "chatml", "brackets", "thought"],
)
def test_conversations(build_tokenizer, template, messages, expected):
    tokenizer = build_tokenizer(chat_template=template)
    rendered = render("messages", {"messages": messages}, tokenizer)
    assert segments(rendered) == expected
    # Each turn stands right behind the prompt that generation would be given at that point.
    for (start, _), turn in zip(rendered.spans, (i for i in (2, 4)), strict=True):
        before = TALK[len(TALK) - len(messages) : turn]
        prompt = render_prompt("messages", {"messages": before}, tokenizer, "\n")
        assert rendered.text[:start] == prompt


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (REFUSING, "the chat template refuses the messages: roles must alternate"),
        (FORCED_THOUGHT, "message 2: the chat template does not render the messages before it"),
        (REWRITING, "message 2: the chat template renders this answer differently once more"),
    ],
)
def test_templates_that_cannot_be_trained_on(build_tokenizer, template, message):
    tokenizer = build_tokenizer(chat_template=template)
    with pytest.raises(GraftError) as caught:
        render("messages", {"messages": TALK[1:]}, tokenizer)
    assert str(caught.value).startswith(message)


def test_null_keys_of_messages_are_absent_to_the_template(build_tokenizer):
    template = CHATML.replace(
        "{{ m['role'] }}", "{% if 'name' in m %}BAD{% endif %}{{ m['role'] }}"
    )
    tokenizer = build_tokenizer(chat_template=template)
    messages = [{**message, "name": None} for message in TALK[1:3]]
    assert "BAD" not in render("messages", {"messages": messages}, tokenizer).text


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("text", {"text": "all of it"}, [("", False), ("all of it", True)]),
        ("prompt", {"prompt": "p", "completion": "c"}, [("p~", False), ("c", True)]),
        ("prompt", {"prompt": "p\n", "completion": "c"}, [("p\n", False), ("c", True)]),
        ("prompt", {"prompt": "p ", "completion": " c"}, [("p ", False), (" c", True)]),
        ("prompt", {"prompt": "", "completion": "c"}, [("", False), ("c", True)]),
        (
            "instruction",
            {"instruction": "do", "input": "", "output": "done"},
            [("### Instruction:\ndo\n\n### Response:\n", False), ("done", True)],
        ),
        (
            "instruction",
            {"instruction": "do", "input": "this", "output": "done"},
            [
                ("### Instruction:\ndo\n\n### Input:\nthis\n\n### Response:\n", False),
                ("done", True),
            ],
        ),
    ],
)
def test_flat_rows_and_their_prompts(tokenizer, kind, fields, expected):
    assert segments(render(kind, fields, tokenizer, "~")) == expected
    if kind != "text":
        assert render_prompt(kind, fields, tokenizer, "~") == expected[0][0]


def test_a_string_stands_for_the_simplest_prompt(tokenizer):
    assert render_prompt("text", "a", tokenizer, "~") == "a"
    assert render_prompt("prompt", "a", tokenizer, "~") == "a~"
    instruction = render_prompt("instruction", "a", tokenizer, "~")
    assert instruction == "### Instruction:\na\n\n### Response:\n"
    assert render_prompt("messages", "a", tokenizer, "~") == "### user:\na\n\n### assistant:\n"


def test_prompts_that_lack_their_key(tokenizer):
    with pytest.raises(GraftError, match="needs the key 'instruction'; found keys prompt"):
        render_prompt("instruction", {"prompt": "a"}, tokenizer, "\n")
    with pytest.raises(GraftError, match="'messages' is a string"):
        render_prompt("messages", {"messages": "a"}, tokenizer, "\n")
    with pytest.raises(GraftError, match="'messages' is an empty list"):
        render_prompt("messages", {"messages": []}, tokenizer, "\n")


def test_the_default_template_can_be_shipped(build_tokenizer):
    without = build_tokenizer()
    shipped = build_tokenizer(chat_template=DEFAULT_CHAT_TEMPLATE)
    fields = {"messages": TALK}
    assert render("messages", fields, without) == render("messages", fields, shipped)


def test_a_shape_whose_prompt_is_not_what_it_trains_on_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(type(SHAPES["prompt"]), "render_prompt", lambda *args: "Q: ")
    row = Row("d:1", {"prompt": "a", "completion": "b"})
    assert render_row("prompt", row, tokenizer, "\n").text == "Q: b"
    other = Rendered("A: b", ((3, 4),))
    monkeypatch.setattr(type(SHAPES["prompt"]), "render", lambda *args: other)
    with pytest.raises(GraftError, match="is trained on another beginning than its prompt"):
        render_row("prompt", row, tokenizer, "\n")
