"""Messages as people's files have them, read into one form: OpenAI's, as templates expect it.

What a template may render is kept, whatever it is called; what only says how to train (`weight`)
is taken out. Whether the template does render it is seen when it is rendered (`traces.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graft.data.conversations.contents import PART
from graft.data.conversations.tools import call_problems, called, decoded_tools, template_variables
from graft.data.shapes.base import text_problem, type_in_words
from graft.text import listed, quoted

LOSS_KEYS = ("weight", "loss", "train", "training")
"""Keys of a message that say whether it is trained: 0, 1, false or true."""
_PART_KEYS = ("type", PART)  # a part has what it is under the name of its type


@dataclass
class Conversation:
    """Messages and tools in one form, and which messages are trained."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    trains: list[bool] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    """Further names that the template may read: `chat_template_kwargs`."""
    remarks: list[str] = field(default_factory=list)
    """What has no effect, as clauses that complete 'in N rows'."""

    @property
    def turns(self) -> list[int]:
        """The messages that train."""
        return [index for index, trains in enumerate(self.trains) if trains]


def read_conversation(fields: Mapping[str, Any]) -> tuple[Conversation, list[str]]:
    """Return the conversation of a row's `messages`, `tools` and the like, and what is wrong."""
    found = Conversation()
    problems = _read_messages(fields["messages"], found)
    found.tools, wrong = decoded_tools(fields.get("tools"), fields.get("functions"))
    problems += wrong
    found.variables, wrong = template_variables(fields.get("chat_template_kwargs"))
    return found, problems + wrong


def answer_problems(found: Conversation) -> list[str]:
    """Return why a conversation that is read holds nothing to train, if it does not."""
    roles = [message["role"] for message in found.messages]
    if "assistant" not in roles:
        return [f"no message of role 'assistant' (roles: {listed(roles)}), so nothing to train"]
    if not found.turns:
        keys = ", ".join(LOSS_KEYS)
        return [f"no message of the assistant's is trained, as their {keys} say; remove the row"]
    if found.trains[0]:
        return [
            "message 1: the assistant speaks first, with nothing to answer; put a user's "
            "message before it, give it weight 0, or remove it"
        ]
    # Not of a prompt: a model may have said nothing, and is asked again.
    return [
        f"message {index + 1}: the assistant's content is empty"
        for index in found.turns
        if not found.messages[index].get("content", "").strip()
        and "tool_calls" not in found.messages[index]
    ]


def shown_text(message: Mapping[str, Any]) -> str:
    """Return a message for a reader's eyes: its content, or else its calls as JSON."""
    text: str = message.get("content", "")
    if text or "tool_calls" not in message:
        return text
    return json.dumps(message["tool_calls"], ensure_ascii=False)


def _read_messages(messages: object, found: Conversation) -> list[str]:
    if not isinstance(messages, list):
        perhaps = ", or JSON of one" if isinstance(messages, str) else ""
        return [f"'messages' is {type_in_words(messages)}; expected a list of objects{perhaps}"]
    if not messages:
        return ["'messages' is an empty list; expected at least one message"]
    problems: list[str] = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            problems.append(f"message {number} is {type_in_words(message)}; expected an object")
            continue
        wrong = _read_message(message, found)
        problems += [f"message {number}: {problem}" for problem in wrong]
    return problems


def _read_message(message: Mapping[str, Any], found: Conversation) -> list[str]:
    """Take a message in; return what is wrong with it."""
    # What is null is not there: so transformers has it too.
    kept = {key: value for key, value in message.items() if value is not None}
    problems: list[str] = []
    if "role" not in message:
        return [f"'role' is missing (keys: {listed(message)})"]
    if wrong := text_problem(message["role"]):
        return [f"'role' {wrong}"]
    trains, wrong_weight = _trains(kept, found)
    problems += wrong_weight
    problems += called(kept)
    problems += call_problems(kept)
    problems += _read_content(message, kept, found)
    found.messages.append(kept)
    found.trains.append(trains)
    return problems


def _trains(kept: dict[str, Any], found: Conversation) -> tuple[bool, list[str]]:
    """Take out what says whether a message is trained; return that, and what is wrong."""
    said: dict[str, bool] = {}
    problems = []
    for key in LOSS_KEYS:
        if key not in kept:
            continue
        value = kept.pop(key)
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            problems.append(
                f"{key!r} is {quoted(value, 40)}; expected 0 or 1, as an answer is trained whole "
                "or not at all"
            )
        said[key] = bool(value)
    if len(set(said.values())) > 1 and not problems:
        words = ", ".join(f"{key} {str(value).lower()}" for key, value in said.items())
        problems.append(f"its keys contradict each other ({words}); keep one of them")
    role = kept["role"]
    if role == "assistant":
        return all(said.values()), problems
    # Exports fill such a column for every message, so it is no reason to refuse the row.
    for key, value in said.items():
        remark = (
            f"{key!r} of {role} messages has no effect, as only the assistant's messages are "
            "trained"
        )
        if value and remark not in found.remarks:
            found.remarks.append(remark)
    return False, problems


def _read_content(
    message: Mapping[str, Any], kept: dict[str, Any], found: Conversation
) -> list[str]:
    """Put the content's text in its place; return what is wrong with it."""
    content = kept.get("content")
    if isinstance(content, list):
        content, problems = _joined(content, found)
        kept["content"] = content
        if problems:
            return problems
    speaks = kept["role"] == "assistant"
    if content is None or (content == "" and speaks):
        if speaks and "tool_calls" in kept:
            # Null, empty or absent beside a call: all of these are one thing to say.
            kept.pop("content", None)
            return []
        if "content" not in message:
            return [f"'content' is missing (keys: {listed(message)})"]
        if content is None:
            return ["'content' is null; expected a string"]
    if wrong := text_problem(content):
        return [f"'content' {wrong}"]
    assert isinstance(content, str)
    return []


def _joined(parts: list[Any], found: Conversation) -> tuple[str, list[str]]:
    """Return the text of a content in parts, and what is wrong with them."""
    texts: list[str] = []
    problems: list[str] = []
    for number, part in enumerate(parts, start=1):
        if not isinstance(part, Mapping):
            problems.append(f"part {number} is {type_in_words(part)}; expected an object")
            continue
        kind, text = part.get("type"), part.get("text")
        if kind != PART and not (kind is None and isinstance(text, str)):
            problems.append(
                f"part {number} is of type {quoted(kind, 40)}; graft trains on parts of type "
                "'text' alone, so take it out, or remove the row"
            )
        elif wrong := text_problem(text):
            problems.append(f"part {number}: 'text' {wrong}")
        else:
            texts.append(str(text))
            for key, value in part.items():
                remark = f"{quoted(key, 40)} of parts of a content is not read"
                if key in _PART_KEYS or value is None or remark in found.remarks:
                    continue
                found.remarks.append(remark)
    return "".join(texts), problems
