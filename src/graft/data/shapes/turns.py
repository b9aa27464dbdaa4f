"""Conversations as data sets write them, as a list of messages with role and content."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from graft.data.shapes.base import type_in_words
from graft.data.sources.json_values import is_deep
from graft.errors import GraftError
from graft.text import quoted

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "ai": "assistant",
}
"""Names of roles that mean the same wherever they stand."""
_SPEAKERS = {
    **_ROLES,
    **{name: name for name in ("user", "assistant", "system", "tool")},
    "model": "assistant",
    "prompter": "user",
    "function_response": "tool",
    "tool_response": "tool",
    "observation": "tool",
    "function": "tool",
}
"""Further names, of who speaks under a key `from`."""
_CALLS = ("function_call", "tool_call")
"""Who speaks where the text is a call of a function, as JSON."""
_SAYS = (
    *(("from", "value"), ("role", "value"), ("from", "content")),
    *(("role", "text"), ("speaker", "text"), ("user", "text")),
)
"""The keys of who speaks and what is said, where they are not `role` and `content`."""
_EXCHANGES = (
    *(("human", "assistant"), ("user", "assistant"), ("prompt", "response")),
    *(("question", "answer"), ("instruction", "output")),
)
"""The keys of a turn that holds what both say."""


def as_messages(turns: object) -> Any:
    """Return a conversation as messages; what is none is returned as it is.

    Taken are messages, turns of `from` and `value` and the like, bare texts of user and assistant
    in turn, one message alone, a table of them, and JSON of any of these. Other keys of a turn
    stay. Raises GraftError for a turn that is a call of a function and no JSON.
    """
    if isinstance(turns, str):
        turns = _parsed(turns)
    if isinstance(turns, Mapping):
        turns = _apart(turns) if is_table(turns) else [turns]
    if not isinstance(turns, list):
        return turns
    if all(type(turn) is dict and "role" in turn and "content" in turn for turn in turns):
        if not any(turn["role"] in _ROLES for turn in turns if isinstance(turn["role"], str)):
            return turns  # as nearly all are
    elif turns and all(isinstance(turn, str) for turn in turns):
        roles = ("user", "assistant")
        return [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]
    for asked, answer in _EXCHANGES:
        if turns and all(
            isinstance(turn, Mapping) and {asked, answer} <= turn.keys() for turn in turns
        ):
            return [message for turn in turns for message in _exchanged(turn, asked, answer)]
    return [_message(turn, number) for number, turn in enumerate(turns, start=1)]


def is_table(value: object) -> bool:
    """Return whether a value has a list under each key, as `datasets` keeps a sequence of turns."""
    if not isinstance(value, Mapping) or not all(isinstance(one, list) for one in value.values()):
        return False
    return len({len(one) for one in value.values()}) == 1


def with_system(messages: Any, system: object) -> Any:
    """Return messages behind a system's text, which stands beside them in its row.

    Raises GraftError when it is no text, or they begin with another one.
    """
    if not isinstance(system, str):
        raise GraftError(f"'system' is {type_in_words(system)}; expected a string")
    if not system.strip() or not isinstance(messages, list):
        return messages
    first = messages[0] if messages and isinstance(messages[0], Mapping) else {}
    if first.get("role") != "system":
        return [{"role": "system", "content": system}, *messages]
    if first.get("content") != system:
        raise GraftError("'system' is another text than the first message, of role system, has")
    return messages


def untrained(messages: Sequence[Any], count: int) -> list[Any]:
    """Return messages of which the answers among the first so many are not trained."""
    return [
        {**message, "weight": 0}
        if number < count and isinstance(message, Mapping) and message.get("role") == "assistant"
        else message
        for number, message in enumerate(messages)
    ]


def _apart(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(table, turn, strict=True)) for turn in zip(*table.values(), strict=True)]


def _exchanged(turn: Mapping[str, Any], asked: str, answer: str) -> list[dict[str, Any]]:
    """Return what both say in a turn; its other keys are the answer's."""
    rest = {key: value for key, value in turn.items() if key not in (asked, answer)}
    return [
        {"role": "user", "content": turn[asked]},
        {**rest, "role": "assistant", "content": turn[answer]},
    ]


def _parsed(text: str) -> object:
    try:
        found = json.loads(text) if text.lstrip()[:1] in ("[", "{") else text
    except (ValueError, RecursionError):
        return text
    return text if is_deep(found) else found


def _message(turn: Any, number: int) -> Any:
    if not isinstance(turn, Mapping):
        return turn
    role = turn.get("role")
    if "role" in turn and ("content" in turn or "tool_calls" in turn):
        if isinstance(role, str) and role in _ROLES:
            return {**turn, "role": _ROLES[role]}
        return turn
    for who, what in _SAYS:
        if who in turn and what in turn:
            break
    else:
        return turn
    speaker, said = turn[who], turn[what]
    rest = {key: value for key, value in turn.items() if key not in (who, what)}
    if not isinstance(speaker, str):
        return {"role": speaker, "content": said, **rest}
    name = speaker.lower()
    if name in _CALLS:
        return {"role": "assistant", "content": "", "tool_calls": _calls(said, number), **rest}
    return {"role": _SPEAKERS.get(name, speaker), "content": said, **rest}


def _calls(said: object, number: int) -> list[dict[str, Any]]:
    """Return the calls that a text of JSON names: an object of name and arguments, or a list."""
    found: Any = said
    if isinstance(said, str):
        try:
            found = json.loads(said)
        except (ValueError, RecursionError):
            found = None
    calls: list[Any] = found if isinstance(found, list) else [found]
    for call in calls:
        if not isinstance(call, Mapping) or "name" not in call:
            shown = quoted(said) if isinstance(said, str) else type_in_words(said)
            raise GraftError(
                f"message {number}: a call of a function is {shown}; expected JSON of an object "
                "with name and arguments"
            )
    return [dict(call) for call in calls]
