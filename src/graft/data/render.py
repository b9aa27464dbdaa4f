"""Rendering: a row becomes one text and the character spans in it that are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jinja2 import TemplateError

from graft.data.rows import Row, RowKind, message_problems
from graft.errors import GraftError, raise_problems

DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\\n' }}{% endif %}"
)
"""Chat template of a tokenizer that has none; ship it with the model that was trained on it."""


class Tokenizer(Protocol):
    """What the data layer uses of a fast Hugging Face tokenizer."""

    @property
    def is_fast(self) -> bool:
        """Whether it is backed by the tokenizers library, which knows character offsets."""

    @property
    def chat_template(self) -> Any:
        """The Jinja template of conversations, or None."""

    @property
    def bos_token(self) -> str | None:
        """The text of the token that begins a sequence, or None."""

    @property
    def eos_token_id(self) -> int | None:
        """The id of the token that ends a sequence, or None."""

    def __call__(self, text: list[str], **options: Any) -> Mapping[str, Any]:
        """Encode texts."""

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:
        """Render messages as text."""

    def convert_ids_to_tokens(self, ids: list[int]) -> Any:
        """Return the tokens' own spelling."""


@dataclass(frozen=True)
class Rendered:
    """A text and its trained parts, as sorted [start, end) character spans."""

    text: str
    spans: tuple[tuple[int, int], ...]


def render_row(kind: RowKind, row: Row, tokenizer: Tokenizer, separator: str) -> Rendered:
    """Render a checked row; the text up to each span is what generation will be prompted with.

    Raises GraftError when the chat template refuses the messages or rewrites earlier turns.
    """
    if kind == "text":
        text = row.fields["text"]
        return Rendered(text, ((0, len(text)),))
    if kind == "messages":
        return _render_messages(row.fields["messages"], tokenizer)
    prompt = render_prompt(kind, row.fields, tokenizer, separator)
    text = prompt + row.fields["output" if kind == "instruction" else "completion"]
    return Rendered(text, ((len(prompt), len(text)),))


def render_prompt(
    kind: RowKind, fields: str | Mapping[str, Any], tokenizer: Tokenizer, separator: str
) -> str:
    """Render a prompt exactly as training rendered what stands before the trained part.

    A string stands for the row's text, prompt, instruction (without input) or single user
    message; a mapping holds the row's keys, those of the answer are not read.

    Raises GraftError when a key is missing or the chat template refuses the messages.
    """
    if isinstance(fields, str):
        one = {"role": "user", "content": fields}
        fields = {"messages": [one]} if kind == "messages" else {kind: fields}
    if kind not in fields:
        found = ", ".join(fields) or "none"
        raise GraftError(f"a prompt of kind {kind} needs the key {kind!r}; found keys {found}")
    if kind == "messages":
        messages = fields["messages"]
        raise_problems(message_problems(messages), "prompt")
        return _apply_template(messages, tokenizer, generation=True)
    if kind == "instruction":
        given = f"### Input:\n{fields['input']}\n\n" if fields.get("input") else ""
        return f"### Instruction:\n{fields['instruction']}\n\n{given}### Response:\n"
    text: str = fields[kind]
    if kind == "prompt" and text and not text[-1].isspace():
        return text + separator
    return text


def _render_messages(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> Rendered:
    """Render up to the last assistant turn; spans hold each answer with its end-of-turn token.

    Each turn begins where the template, given the messages before it, asks for an answer.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    messages = messages[: turns[-1] + 1]
    # White space after the last turn's end would only stand between it and the EOS token.
    text = _apply_template(messages, tokenizer, generation=False).rstrip()
    spans = []
    for index in turns:
        before = _apply_template(messages[:index], tokenizer, generation=True)
        through = _apply_template(messages[: index + 1], tokenizer, generation=False).rstrip()
        start = len(before)
        if not through.startswith(before) or not text.startswith(before):
            raise GraftError(
                f"message {index + 1}: the chat template does not render the messages before "
                "it, with its generation prompt, as the beginning of the conversation, so the "
                "model would be trained on another prompt than it is asked; mend the "
                "template or give the rows as prompt, completion"
            )
        turn = through[start:]
        if not text.startswith(turn, start):
            turn = _without_lead(turn, messages[index]["content"])
        if not turn or not text.startswith(turn, start):
            raise GraftError(
                f"message {index + 1}: the chat template renders this answer differently once "
                "more messages follow; make each answer the last message of a row of its own"
            )
        spans.append((start, start + len(turn)))
    return Rendered(text, tuple(spans))


def _without_lead(turn: str, content: str) -> str:
    """Drop what a template writes before the content of the last turn only (empty thoughts)."""
    begin = turn.rfind(content.strip())
    return turn[begin:] if begin >= 0 else ""


def _apply_template(
    messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, *, generation: bool
) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=DEFAULT_CHAT_TEMPLATE if tokenizer.chat_template is None else None,
            tokenize=False,
            add_generation_prompt=generation,
        )
    except TemplateError as error:
        raise GraftError(f"the chat template refuses the messages: {error}") from error
    return text
