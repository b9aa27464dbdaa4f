"""Conversations: whether messages are whole, and how a chat template renders them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graft.data.shapes.base import Rendered, Tokenizer, text_problem, type_in_words
from graft.data.templates import Renderer, render_within_bounds
from graft.errors import GraftError, raise_problems
from graft.text import listed

DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\\n' }}{% endif %}"
)
"""Chat template of a tokenizer that has none; ship it with the model that was trained on it."""


def message_problems(messages: object) -> list[str]:
    """Return what keeps a value from being a list of messages, each with role and content."""
    if not isinstance(messages, list):
        return [f"'messages' is {type_in_words(messages)}; expected a list of objects"]
    if not messages:
        return ["'messages' is an empty list; expected at least one message"]
    problems = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            problems.append(f"message {number} is {type_in_words(message)}; expected an object")
            continue
        for key in ("role", "content"):
            if key not in message:
                keys = listed(message)
                problems.append(f"message {number}: {key!r} is missing (keys: {keys})")
            elif wrong := text_problem(message[key]):
                problems.append(f"message {number}: {key!r} {wrong}")
        content = message.get("content")
        if message.get("role") == "assistant" and isinstance(content, str) and not content.strip():
            problems.append(f"message {number}: the assistant's content is empty")
    return problems


def answer_problems(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return why well-formed messages hold nothing to train, if they do not."""
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        return [f"no message of role 'assistant' (roles: {listed(roles)}), so nothing to train"]
    if roles[0] == "assistant":
        return [
            "message 1: the assistant speaks first, with nothing to answer; "
            "put a user's message before it, or remove it"
        ]
    return []


def chat_prompt(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> str:
    """Return messages as the chat template renders them, and its opening of an answer.

    Raises GraftError when they are no messages or the template refuses them.
    """
    return chat_opening(messages, tokenizer).text


def chat_opening(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> Rendered:
    """Return `chat_prompt`, with the seams that training has: both ends of each answer in it.

    Raises GraftError as `chat_prompt` does.
    """
    raise_problems(message_problems(messages), "prompt")
    return Rendered(_apply_template(messages, tokenizer, [(len(messages), True)])[0])


def render_chat(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> Rendered:
    """Render up to the last assistant turn; spans hold each answer with its end-of-turn token.

    Each turn begins where the template, given the messages before it, asks for an answer.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    messages = messages[: turns[-1] + 1]
    beginnings = [(len(messages), False)]
    for index in turns:
        beginnings += [(index, True), (index + 1, False)]
    texts = _apply_template(messages, tokenizer, beginnings)
    # White space after the last turn's end would only stand between it and the EOS token.
    text = texts[0].rstrip()
    spans = []
    for index, before, through in zip(turns, texts[1::2], texts[2::2], strict=True):
        through = through.rstrip()
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
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    beginnings: Sequence[tuple[int, bool]],
) -> list[str]:
    template = DEFAULT_CHAT_TEMPLATE if tokenizer.chat_template is None else None
    texts: list[str] = render_within_bounds(
        tokenizer, template, _render_beginnings, [messages, beginnings]
    )
    for text in texts:
        if problem := text_problem(text):
            raise GraftError(f"what the chat template renders {problem}")
    return texts


def _render_beginnings(renderer: Renderer, request: Any) -> list[str]:
    messages, beginnings = request
    renderer.begin(sum(len(str(message.get("content"))) + 100 for message in messages))
    return [renderer.render(messages[:end], ask=ask) for end, ask in beginnings]
