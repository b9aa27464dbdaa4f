"""Tools of a conversation: those that may be called, and calls of them, in OpenAI's shape."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from graft.data.shapes.base import type_in_words
from graft.data.sources.json_values import DEPTH, is_deep
from graft.text import listed, quoted, reason

_RESERVED = frozenset(
    {
        *("conversation", "conversations", "messages", "tools", "documents", "chat_template"),
        *("add_generation_prompt", "continue_final_message", "tokenize", "padding", "truncation"),
        *("sanitize_control_tokens", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs", "self"),
    }
)
"""Names that `apply_chat_template` has for something else."""
_ARGUMENTS = ("parameters", "args", "kwargs", "input")
"""What other formats call the arguments of a call."""


def decoded_tools(
    tools: object, functions: object
) -> tuple[list[dict[str, Any]] | None, list[str]]:
    """Return the tools of a row as JSON schemas in OpenAI's shape, and what is wrong with them.

    tools: a list, or one alone, perhaps as a JSON string. functions: OpenAI's former name for them.
    """
    values = {}
    for key, given in (("tools", tools), ("functions", functions)):
        value, problem = _decoded(given)
        if problem:
            return None, [f"{key!r} {problem}"]
        if value not in (None, "", []):
            values[key] = value
    if not values:
        return None, []
    if len(values) > 1:
        return None, ["'functions' and 'tools' are both given; keep 'tools'"]
    ((key, value),) = values.items()
    value = [value] if isinstance(value, Mapping) else value
    if not isinstance(value, list):
        return None, [f"{key!r} is {type_in_words(value)}; expected a list of tools"]
    found: list[dict[str, Any]] = []
    problems = []
    for number, one in enumerate(value, start=1):
        tool, problem = _decoded(one)
        if isinstance(tool, Mapping):
            named = tool.get("function", tool)
            if isinstance(named, Mapping) and isinstance(named.get("name"), str):
                # A bare function, as its schema has it.
                whole = tool if "function" in tool else {"type": "function", "function": tool}
                found.append(dict(whole))
                continue
            problem = f"has no name (keys: {listed(tool)})"
        problems.append(
            f"{key!r}: tool {number} {problem or f'is {type_in_words(tool)}; expected an object'}"
        )
    return found, problems


def template_variables(given: object) -> tuple[dict[str, Any], list[str]]:
    """Return `chat_template_kwargs`: names for the template to read, and what is wrong with it."""
    value, problem = _decoded(given)
    if problem:
        return {}, [f"'chat_template_kwargs' {problem}"]
    if value in (None, ""):
        return {}, []
    if not isinstance(value, Mapping):
        return {}, [f"'chat_template_kwargs' is {type_in_words(value)}; expected an object"]
    problems = [
        f"'chat_template_kwargs': {quoted(key, 40)} is no variable of a template; take it out"
        for key in value
        if key in _RESERVED or not str(key).isidentifier()
    ]
    return {key: one for key, one in value.items() if one is not None}, problems


def called(kept: dict[str, Any]) -> list[str]:
    """Turn OpenAI's former `function_call` and role `function` into today's; return problems."""
    if kept["role"] == "function":
        kept["role"] = "tool"
    call = kept.get("function_call")
    if call is None:
        return []
    if kept.get("tool_calls"):
        return ["'function_call' and 'tool_calls' are both given; keep 'tool_calls'"]
    if not isinstance(call, Mapping):
        return [f"'function_call' is {type_in_words(call)}; expected an object"]
    del kept["function_call"]
    kept["tool_calls"] = [{"type": "function", "function": dict(call)}]
    return []


def call_problems(kept: dict[str, Any]) -> list[str]:
    """Bring the calls of a message into one form, arguments as an object; return problems."""
    if "tool_calls" not in kept:
        return []
    calls, problem = _decoded(kept["tool_calls"])
    if problem:
        return [f"'tool_calls' {problem}"]
    if calls in ("", []):
        del kept["tool_calls"]
        return []
    if not isinstance(calls, list):
        return [f"'tool_calls' is {type_in_words(calls)}; expected a list of objects"]
    problems = []
    found: list[dict[str, Any]] = []
    for number, one in enumerate(calls, start=1):
        call, problem = _call(one)
        found.append(call)
        if problem:
            problems.append(f"tool call {number}{problem}")
    kept["tool_calls"] = found
    return problems


def _call(one: object) -> tuple[dict[str, Any], str | None]:
    """Return a call in OpenAI's shape, and what is wrong with it."""
    if not isinstance(one, Mapping):
        return {}, f" is {type_in_words(one)}; expected an object"
    call = {key: value for key, value in one.items() if value is not None}
    if "function" not in call and "name" in call:
        function = {key: call.pop(key) for key in ("name", "arguments") if key in call}
        call = {**call, "type": "function", "function": function}
    named = call.get("function")
    if not isinstance(named, Mapping) or not isinstance(named.get("name"), str):
        return {}, f" names no function (keys: {listed(one)})"
    if "arguments" not in named and (other := _arguments_elsewhere(call, named)):
        return {}, f": its arguments stand under {other!r}; name that key 'arguments'"
    arguments = named.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments, problem = _decoded(arguments)
        if problem:
            return {}, f": 'arguments' {problem}"
    if arguments in (None, ""):
        arguments = {}
    if not isinstance(arguments, Mapping):
        kind = type_in_words(arguments)
        return {}, f": 'arguments' is {kind}; expected an object, or one as a JSON string"
    try:
        json.dumps(arguments, allow_nan=False, default=repr)
    except ValueError:
        return {}, ": 'arguments' holds a number that is no JSON (NaN or infinite)"
    given = {key: value for key, value in named.items() if value is not None}
    call["function"] = {**given, "arguments": dict(arguments)}
    return call, None


def _arguments_elsewhere(*given: Mapping[str, Any]) -> str | None:
    """Return the key under which a call has its arguments, where that is one of other formats."""
    return next((key for key in _ARGUMENTS for one in given if one.get(key) is not None), None)


def _decoded(value: object) -> tuple[Any, str | None]:
    """Return what a JSON string holds, and anything else as it is; or what is wrong."""
    if not isinstance(value, str) or not value.strip():
        return "" if isinstance(value, str) else value, None
    try:
        found = json.loads(value, parse_constant=_no_number, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        return None, f"is a string that is no JSON: {reason(error, 100)}: {quoted(value, 60)}"
    if is_deep(found):
        return None, f"is nested more than {DEPTH} levels deep"
    return found, None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in it")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
