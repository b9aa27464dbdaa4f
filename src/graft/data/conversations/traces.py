"""What a chat template renders of messages: a value that leaves no trace is told.

Every value is replaced by a text that is found nowhere else, and looked for in what is rendered.
What is not found is changed once more: if nothing changes with it, the template does not read it.
This depends on which keys the messages have, and not on what they say, so it is found out once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graft.errors import GraftError

_MOST_KEPT = 64
_BESIDE = "content beside tool_calls"
_KINDS = dict[tuple[str, str], list[int]]
"""Messages by role and key."""
Render = Callable[..., str]
"""(messages, ask, tools, variables) -> text."""


@dataclass(frozen=True)
class Traces:
    """What is not rendered."""

    remarks: tuple[str, ...] = ()
    """What leaves no trace, as clauses that complete 'in N rows'."""
    mute: frozenset[int] = frozenset()
    """Messages of the assistant's of which nothing is rendered."""


def structure(messages: Sequence[Mapping[str, Any]]) -> tuple[object, ...]:
    """Return which keys messages have, and whether there is anything in them."""
    return tuple(
        (
            message["role"],
            tuple(key for key, value in message.items() if value not in ("", [], {})),
            _calls_structure(message["tool_calls"]) if "tool_calls" in message else None,
        )
        for message in messages
    )


def _calls_structure(calls: Sequence[Mapping[str, Any]]) -> tuple[object, ...]:
    return tuple(
        (tuple(call), tuple(call["function"]), bool(call["function"]["arguments"]))
        for call in calls
    )


def find_traces(
    known: dict[Any, Any],
    key: object,
    render: Render,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
) -> Traces:
    """Return what of a conversation the template does not render.

    It is a function of the messages' structure, whether there are tools, and the variables: of
    `key`, by which `known` keeps it.
    """
    found: Traces | None = known.get(("traces", key))
    if found is None:
        found = _Search(render, messages, bool(tools), variables).traces()
        if len(messages) <= _MOST_KEPT:  # there may be as many kinds of long rows as there are rows
            known["traces", key] = found
    return found


@dataclass
class _Marked:
    messages: list[dict[str, Any]] = field(default_factory=list)
    marks: dict[tuple[int, str], list[str]] = field(default_factory=dict)
    """The texts that stand for a message's key; none where its value cannot be replaced."""


class _Search:
    """One search: the marked messages and what is rendered of them."""

    def __init__(
        self,
        render: Render,
        messages: Sequence[Mapping[str, Any]],
        tools: bool,
        variables: Mapping[str, Any],
    ) -> None:
        self._render = render
        self._messages, self._variables = messages, variables
        self._marks = 0
        self._ids: dict[str, str] = {}
        self._tools = [_tool(self._mark())] if tools else None
        self._marked = self._all_marked(messages)
        self._text = ""

    def traces(self) -> Traces:
        """Return what is not rendered."""
        try:
            self._text = self._rendered(self._marked.messages)
        except GraftError:
            # It refuses the marks, so nothing is looked for, and everything is changed.
            self._marked.messages = [dict(message) for message in self._messages]
            self._marked.marks = {place: [] for place in self._marked.marks}
            self._text = self._rendered(self._marked.messages)
        shown = self._text.lower()
        suspects: _KINDS = {}
        for (index, key), marks in self._marked.marks.items():
            if not marks or not all(mark in shown for mark in marks):
                message = self._marked.messages[index]
                if key == "content" and "tool_calls" in message:
                    key = _BESIDE
                suspects.setdefault((message["role"], key), []).append(index)
        unread = {kind: at for kind, at in suspects.items() if self._unread(kind[1], at)}
        remarks = [_clause(*kind, self._everywhere(*kind, at)) for kind, at in unread.items()]
        if self._tools and self._name(self._tools) not in shown:
            remarks.append("the chat template renders nothing of 'tools'")
        if self._variables and self._without_variables():
            names = ", ".join(map(repr, self._variables))
            remarks.append(f"the chat template reads no {names} of 'chat_template_kwargs'")
        return Traces(tuple(remarks), self._mute(unread))

    def _everywhere(self, role: str, key: str, at: Sequence[int]) -> bool:
        """Return whether those are all messages of a role that have a key."""
        messages, marks = self._marked.messages, self._marked.marks
        return at == [n for n, kind in marks if kind == key and messages[n]["role"] == role]

    def _mute(self, unread: _KINDS) -> frozenset[int]:
        gone = {
            (index, "content" if key == _BESIDE else key)
            for (_, key), at in unread.items()
            for index in at
        }
        mute = set()
        for index, message in enumerate(self._marked.messages):
            said = [key for key in ("content", "tool_calls") if message.get(key)]
            if message["role"] == "assistant" and all((index, key) in gone for key in said):
                mute.add(index)
        return frozenset(mute)

    def _rendered(self, messages: Sequence[Mapping[str, Any]], ask: bool = False) -> str:
        return self._render(messages, ask, self._tools, self._variables)

    def _unread(self, key: str, at: Sequence[int]) -> bool:
        """Return whether nothing changes with a key of some messages."""
        changed = list(self._marked.messages)
        for index in at:
            changed[index] = self._changed(changed[index], key)
        try:
            return self._rendered(changed) == self._text
        except GraftError:
            return False

    def _changed(self, message: dict[str, Any], key: str) -> dict[str, Any]:
        changed = copy.deepcopy(message)
        if key in ("content", "tool_call_id", _BESIDE):
            changed["content" if key == _BESIDE else key] = self._other_mark()
        elif key == "tool_calls":
            for call in changed["tool_calls"]:
                call["function"].update(
                    name=self._other_mark(),
                    arguments={self._other_mark(): ""} if call["function"]["arguments"] else {},
                )
        elif key.startswith("tool_calls."):
            for call in changed["tool_calls"]:
                call.pop(key.partition(".")[2], None)
                call["function"].pop(key.removeprefix("tool_calls.function."), None)
        else:
            del changed[key]
        return changed

    def _without_variables(self) -> bool:
        """Return whether the variables change neither a conversation nor its prompt."""
        messages = self._marked.messages
        first = next((n for n, one in enumerate(messages) if one["role"] == "assistant"), 0)
        try:
            return all(
                self._rendered(some, ask) == self._render(some, ask, self._tools, {})
                for some, ask in ((messages, False), (messages[: first or None], True))
            )
        except GraftError:
            return False

    def _all_marked(self, messages: Sequence[Mapping[str, Any]]) -> _Marked:
        found = _Marked()
        for index, message in enumerate(messages):
            marked = dict(message)
            for key, value in message.items():
                if key == "role" or value in ("", [], {}):
                    continue
                if key == "tool_calls":
                    marked[key] = self._marked_calls(index, value, found)
                    continue
                marked[key], marks = self._marked_value(key, value)
                found.marks[index, key] = marks
            found.messages.append(marked)
        return found

    def _marked_value(self, key: str, value: object) -> tuple[object, list[str]]:
        is_id = key == "tool_call_id" and isinstance(value, str)
        mark = self._id(str(value)) if is_id else self._mark()
        marked = _replaced(value, mark)
        return marked, [mark] if marked != value else []

    def _marked_calls(
        self, index: int, calls: Sequence[Mapping[str, Any]], found: _Marked
    ) -> list[dict[str, Any]]:
        marked = []
        for call in calls:
            one = dict(call)
            for key, value in call.items():
                if key in ("type", "function"):
                    continue
                is_id = key == "id" and isinstance(value, str)
                mark = self._id(value) if is_id else self._mark()
                one[key] = _replaced(value, mark)
                marks = found.marks.setdefault((index, f"tool_calls.{key}"), [])
                marks += [mark] if one[key] != value else []
            name, argument, value = self._mark(), self._mark(), self._mark()
            given = call["function"]["arguments"]
            one["function"] = {"name": name, "arguments": {argument: value} if given else {}}
            for key, other in call["function"].items():
                if key in ("name", "arguments"):
                    continue
                mark = self._mark()
                one["function"][key] = _replaced(other, mark)
                marks = found.marks.setdefault((index, f"tool_calls.function.{key}"), [])
                marks += [mark] if one["function"][key] != other else []
            marks = found.marks.setdefault((index, "tool_calls"), [])
            marks += [name, value] if given else [name]
            marked.append(one)
        return marked

    def _mark(self) -> str:
        self._marks += 1
        return f"gq{self._marks:05d}zk"

    def _other_mark(self) -> str:
        """Return a mark that differs from others at its beginning, its end and between."""
        self._marks += 1
        return f"kw{self._marks + 50_000:05d}pv"

    def _id(self, value: str) -> str:
        """Return the mark of an id, which a call and its result share."""
        return self._ids.setdefault(value, self._mark())

    @staticmethod
    def _name(tools: Sequence[Mapping[str, Any]]) -> str:
        return str(tools[0]["function"]["name"])


def _tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {}}
    return {
        "type": "function",
        "function": {"name": name, "description": "", "parameters": parameters},
    }


def _replaced(value: object, mark: str) -> object:
    """Return a value with every text in it replaced."""
    if isinstance(value, str):
        return mark
    if isinstance(value, Mapping):
        return {key: _replaced(one, mark) for key, one in value.items()}
    if isinstance(value, list):
        return [_replaced(one, mark) for one in value]
    return value


def _clause(role: str, key: str, everywhere: bool) -> str:
    if key != _BESIDE and not everywhere:
        role = f"some {role}"
    if key == "content":
        return f"{role} messages leave no trace in what the chat template renders"
    if key == _BESIDE:
        return f"the chat template renders nothing of the {_BESIDE} in {role} messages"
    return f"the chat template renders nothing of {key!r} of {role} messages"
