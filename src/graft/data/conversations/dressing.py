"""The form in which a chat template takes messages, found by rendering a few.

Templates differ in what they expect: a content as a text or in parts, the arguments of a call as
an object or as the JSON of one, a content beside a call or none. A template says none of this, so
each form is tried on messages of graft's own, and the first whose texts appear as they should is
the template's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graft.data.conversations.contents import in_parts
from graft.data.templates import Renderer
from graft.errors import GraftError

_KEY, _VALUE, _ASKED, _SAID = "gqkeyzk", "gqvaluezk", "gqaskedzk", "gqsaidzk"
_CALL_ID = "callgraft"
"""Nine letters, as some templates want it."""
_TOOL = {
    "type": "function",
    "function": {"name": "gqnamezk", "description": "", "parameters": {"type": "object"}},
}


@dataclass(frozen=True)
class Form:
    """What a template wants of the same messages."""

    parts: bool = False
    """A content is a list of parts, and no text."""
    empty: bool = False
    """A content that is not there, beside a call, is an empty text."""
    text_arguments: bool = False
    """The arguments of a call are a JSON string."""

    def dressed(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return messages in this form."""
        if self == _PLAIN:
            return list(messages)
        return [self._dressed(message) for message in messages]

    def _dressed(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        if "tool_calls" in message:
            calls = message["tool_calls"]
            if self.text_arguments:
                calls = [_with_text(call) for call in calls]
            message = {**message, "tool_calls": calls}
            if self.empty and "content" not in message:
                message = {"role": message["role"], "content": "", **message}
        if self.parts and isinstance(message.get("content"), str):
            message = {**message, "content": in_parts(message["content"])}
        return message


_PLAIN = Form()
_CALLING = tuple(
    Form(empty=empty, text_arguments=text) for text in (False, True) for empty in (False, True)
)


def forms_of(renderer: Renderer, calls: bool) -> tuple[Form, ...]:
    """Return the form that the template takes; several, to be tried in turn, where it is not seen.

    calls: whether there are tool calls among the messages.
    """
    found: tuple[Form, ...] | None = renderer.known.get(("forms", calls))
    if found is None:
        plain = Form(parts=_wants_parts(renderer))
        found = _calling(renderer, plain.parts) if calls else (plain,)
        renderer.known["forms", calls] = found
    return found


def _wants_parts(renderer: Renderer) -> bool:
    messages = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _SAID}]

    def shows(form: Form) -> bool:
        try:
            text = renderer.render(form.dressed(messages))
        except GraftError:
            return False
        # In a list that is written as Python writes it the texts appear too.
        return _ASKED in text and _SAID in text and f"'{_ASKED}'" not in text

    return not shows(_PLAIN) and shows(Form(parts=True))


def _calling(renderer: Renderer, parts: bool) -> tuple[Form, ...]:
    forms = tuple(replace(form, parts=parts) for form in _CALLING)
    for tools in (None, [_TOOL]):
        for form in forms:
            if _shows_call(renderer, form, tools):
                return (form,)
    return forms


def _shows_call(renderer: Renderer, form: Form, tools: Sequence[Mapping[str, Any]] | None) -> bool:
    """Return whether a call appears as it should: once, and as JSON has it if as an object."""
    function = {"name": "gqnamezk", "arguments": {_KEY: _VALUE}}
    call = {"id": _CALL_ID, "type": "function", "function": function}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": _ASKED},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": _CALL_ID, "name": "gqnamezk", "content": _ASKED},
        {"role": "assistant", "content": _SAID},
    ]
    try:
        text = renderer.render(form.dressed(messages), tools=tools)
    except GraftError:
        return False
    spoilt = (f"'{_KEY}'", f'\\"{_KEY}')
    return _KEY in text and _VALUE in text and not any(one in text for one in spoilt)


def _with_text(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}
