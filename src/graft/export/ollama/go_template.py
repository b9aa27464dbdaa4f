"""The few constructs of Go's text/template that a Modelfile needs: writing and rendering them.

Syntax: https://pkg.go.dev/text/template. The renderer knows what is written here and nothing else;
it is there to check a template before anybody relies on it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

_PIECES = re.compile(r'\{+|"{3,}|"{1,2}|[^{"]+')
_ACTION = re.compile(r'\{\{ ((?:"(?:[^"\\]|\\.)*"|[^"{}])*) \}\}')
_EQUAL = re.compile(r'eq \.(\w+) ("\w+")')
_NAMED = {"\n": "\\n", "\t": "\\t", "\r": "\\r", '"': '\\"', "\\": "\\\\"}


def go_text(text: str) -> str:
    """Return a template that renders as the text, and that a Modelfile's triple quotes can hold.

    Braces open an action, three quotes end a Modelfile's value, and Ollama's parser drops what is
    not printable: each goes there as a string within an action.
    """
    written = []
    for piece in _PIECES.findall(text):
        if piece[0] == "{" or piece.startswith('"""'):
            written.append(_action(piece))
            continue
        for kept, letters in groupby(piece, _survives):
            part = "".join(letters)
            written.append(part if kept else _action(part))
    return "".join(written)


def _survives(letter: str) -> bool:
    return letter.isprintable() or letter in "\n\t"


def _action(text: str) -> str:
    return '{{ "' + "".join(map(_escaped, text)) + '" }}'


def _escaped(letter: str) -> str:
    if letter in _NAMED or letter.isprintable():
        return _NAMED.get(letter, letter)
    code = ord(letter)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def render_go(template: str, values: Mapping[str, Any]) -> str:
    """Return what the template renders to; values by name: Prompt, System, Messages.

    A message has Role and Content. Known are strings, .Name, if, else if, else, end,
    range .Messages, and eq .Name "word"; anything else raises ValueError.
    """
    pieces = _ACTION.split(template)
    if any("{{" in text for text in pieces[::2]):
        raise ValueError(f"an action is not among those that are known: {template!r}")
    written: list[str] = []
    end = _run(pieces, 0, values, written)
    if end != len(pieces):
        raise ValueError(f"{{{{ {pieces[end]} }}}} closes nothing")
    return "".join(written)


def _run(
    pieces: Sequence[str], at: int, values: Mapping[str, Any], written: list[str] | None
) -> int:
    """Execute up to the action that closes the block, and return its place; None: skip only."""
    while at < len(pieces):
        piece, is_action = pieces[at], at % 2 == 1
        if is_action and (piece == "end" or piece.split(" ")[0] == "else"):
            return at
        at += 1
        if is_action and piece.startswith("if "):
            at = _run_if(pieces, at, piece.removeprefix("if "), values, written)
        elif piece == "range .Messages" and is_action:
            begin, at = at, _run(pieces, at, values, None) + 1
            for message in values["Messages"] if written is not None else ():
                _run(pieces, begin, message, written)
        elif written is not None:
            written.append(_value(piece, values) if is_action else piece)
    return at


def _run_if(
    pieces: Sequence[str],
    at: int,
    condition: str,
    values: Mapping[str, Any],
    written: list[str] | None,
) -> int:
    """Execute the first branch that holds, and return the place behind the end."""
    done = written is None
    while True:
        holds = not done and (condition == "" or _holds(condition, values))
        at = _run(pieces, at, values, written if holds else None)
        done = done or holds
        closing = pieces[at]
        at += 1
        if closing == "end":
            return at
        condition = closing.removeprefix("else").removeprefix(" if ")


def _holds(condition: str, values: Mapping[str, Any]) -> bool:
    equal = _EQUAL.fullmatch(condition)
    if equal:
        return bool(values[equal[1]] == ast.literal_eval(equal[2]))
    return bool(_value(condition, values))


def _value(word: str, values: Mapping[str, Any]) -> str:
    if word.startswith('"'):
        return str(ast.literal_eval(word))
    if not re.fullmatch(r"\.\w+", word):
        raise ValueError(f"{{{{ {word} }}}} is not among the actions that are known")
    return str(values[word[1:]])
