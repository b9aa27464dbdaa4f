"""Chat templates in the wild: reproduced to the letter, or refused with the reason."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from graft.data.chat import DEFAULT_CHAT_TEMPLATE
from graft.data.render import render_prompt
from graft.errors import GraftError
from graft.export.ollama.chat_probe import chat_joints, checked_template, conversation, render_chat

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN = "{% if messages[0]['role'] != 'system' %}{{ 'You are helpful.\\n' }}{% endif %}" + CHATML
TRIMMED = CHATML.replace("m['content']", "m['content'] | trim")
LLAMA2 = (  # the system's message within the first user's, BOS before each
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages if m['role'] != 'system' %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + ('<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if loop.first and "
    "system else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = LLAMA2.replace("loop.first", "loop.last").replace("bos_token + ", "")
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}" + CHATML
)
THINKING = CHATML.replace("m['content']", "m['content'].split('</think>')[-1].lstrip('\\n')")
EXACT = {
    "chatml": (CHATML, ()),
    "qwen": (QWEN, ()),
    "graft": (DEFAULT_CHAT_TEMPLATE, ()),
    "llama2": (LLAMA2, ()),
    "trimmed": (TRIMMED, ("strips white space",)),
    "thinking": (THINKING, ("earlier thoughts",)),
}
ALL = ("u", "su", "uau", "suau", "uauauau", "suauau")


def renderer(template: str):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = template
    return lambda messages: render_prompt("messages", {"messages": messages}, tokenizer, "\n")


def derived(template: str):
    render = renderer(template)
    joints = chat_joints(render)
    bos = "<s>" if joints.start_user.startswith("<s>") else ""
    found, notes = checked_template(joints.without_start(bos), render, bos)
    return render, bos, found, notes


@pytest.mark.parametrize("name", EXACT)
def test_templates_are_reproduced(name):
    template, told = EXACT[name]
    render, bos, found, notes = derived(template)
    texts = ["Who?", "It's {{ me }}", 'a "b"""', "last\nline", "5", "six", "7"]
    for roles in ALL:
        messages = conversation(roles, texts)
        assert bos + render_chat(found, messages) == render(messages), roles
    assert len(notes) == len(told)
    assert all(words in note for words, note in zip(told, notes, strict=True))


def test_what_chatml_becomes():
    assert derived(CHATML)[2] == (
        "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n<|im_start|>user\n"
        "{{ else }}<|im_start|>user\n{{ end }}"
        '{{ range .Messages }}{{ if eq .Role "user" }}{{ .Content }}'
        '{{ else if eq .Role "assistant" }}<|im_end|>\n<|im_start|>assistant\n{{ .Content }}'
        "<|im_end|>\n<|im_start|>user\n{{ end }}{{ end }}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_bos_is_left_out_once():
    _, bos, found, _ = derived(LLAMA2)
    assert bos == "<s>"
    rendered = render_chat(found, conversation("uau", ["a", "b", "c"]))
    assert rendered == "[INST] a [/INST] b </s><s>[INST] c [/INST]"


@pytest.mark.parametrize("template", [GEMMA, MISTRAL], ids=["gemma", "mistral"])
def test_a_system_message_that_has_no_place_is_left_out_and_told(template):
    render, bos, found, notes = derived(template)
    assert ".System" not in found and "system message is left out" in notes[0]
    for roles in ("u", "uau", "uauau"):
        messages = conversation(roles, ["a", "b", "c", "d", "e"])
        assert bos + render_chat(found, messages) == render(messages)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages | length }}" + CHATML, "between any two messages: with user it gives '1<"),
        (CHATML.replace("m['content'] +", "m['content'] + m['content'] +"), "once and in its"),
        (CHATML.replace("m['content']", "m['content'] | upper"), "once and in its place"),
        ("{{ raise_exception('never') }}", "refuses the messages: never"),
        ("{% if messages | length > 2 %}{{ raise_exception('one') }}{% endif %}" + CHATML, "one"),
    ],
)
def test_what_cannot_be_said_is_refused(template, words):
    with pytest.raises(GraftError, match=words):
        derived(template)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes"),
        ("{{ 'x' * 10 ** 10 }}", "fails on the messages: (Memory|Overflow)Error"),
        ("{{ messages[0].nothing.more }}", "refuses the messages"),
        ("{{ 'x' * 9999 ~ messages[-1].content ~ messages | length }}", "does not write the"),
    ],
)
def test_a_template_that_takes_all_is_told(template, message, monkeypatch):
    monkeypatch.setenv("GRAFT_BOUNDS", "0.2")
    with pytest.raises(GraftError, match=f"the chat template {message}") as told:
        derived(template)
    assert len(str(told.value)) < 1000
