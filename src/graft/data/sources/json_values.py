"""One value of JSON: no row is lost for a column that nobody reads."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

DEPTH = 100
"""Most lists and objects within each other that a column may have: all that reads it recurses."""

_SPACE = re.compile(r"[ \t\n\r]*")
_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
_SCALAR = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[^\s,\]}]+', re.DOTALL)


class Values:
    """Reads values of JSON, and says of each object in which columns of it something is amiss."""

    def __init__(self) -> None:
        self._doubled: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def decode(self, text: str, begin: int = 0) -> tuple[Any, Mapping[str, str], int]:
        """Return the value that begins at a place, its spoiled columns and where it ends.

        A column with a number of thousands of digits, that is nested too deeply or whose own keys
        stand twice is spoiled: its value is None. Raises ValueError or RecursionError for such a
        value that is no object, and for what is no JSON.
        """
        self._doubled.clear()
        try:
            value, end = self._decoder.raw_decode(text, begin)
        except json.JSONDecodeError:
            raise
        except (ValueError, RecursionError):
            if not text.startswith("{", begin):
                raise
            return self._column_by_column(text, begin)
        if self._doubled and isinstance(value, dict):
            return self._column_by_column(text, begin)
        # Most rows hold fewer brackets than any depth that is looked for.
        if text.count("[", begin, end) + text.count("{", begin, end) > DEPTH:
            return _shallow(value), _deep_columns(value), end
        return value, {}, end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            self._doubled.append(next(name for name, count in counts.items() if count > 1))
        return found

    def _column_by_column(self, text: str, begin: int) -> tuple[Any, Mapping[str, str], int]:
        row: dict[str, Any] = {}
        spoiled: dict[str, str] = {}
        index = _after_space(text, begin + 1)
        closed = text.startswith("}", index)
        while not closed:
            if not text.startswith('"', index):
                problem = "Expecting property name enclosed in double quotes"
                raise json.JSONDecodeError(problem, text, index)
            name, index = self._decoder.raw_decode(text, index)
            index = _after_space(text, index)
            if not text.startswith(":", index):
                raise json.JSONDecodeError("Expecting ':' delimiter", text, index)
            index = _after_space(text, index + 1)
            if name in row:
                spoiled[name] = "it stands twice in the row"
            value, why, end = self._column(text, index)
            row[name] = value
            if why is not None:
                spoiled.setdefault(name, why)
            index = _after_space(text, end)
            closed = text.startswith("}", index)
            if not closed and not text.startswith(",", index):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, index)
            if not closed:
                index = _after_space(text, index + 1)
        return row, spoiled, index + 1

    def _column(self, text: str, begin: int) -> tuple[Any, str | None, int]:
        """Return a column's value, or why it has none, and its end."""
        self._doubled.clear()
        try:
            value, end = self._decoder.raw_decode(text, begin)
        except json.JSONDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            return None, reason(error), end_of(text, begin)
        if self._doubled:
            return None, f"the key {self._doubled[0]!r} stands twice in it", end
        if is_deep(value):
            return None, _TOO_DEEP, end
        return value, None, end


def end_of(text: str, begin: int) -> int:
    """Return where a value ends that begins at a place, however deep it is; its inside is unread.

    Raises JSONDecodeError for one that does not end.
    """
    if text[begin : begin + 1] not in ("[", "{"):
        found = _SCALAR.match(text, begin)
        if found is None:
            raise json.JSONDecodeError("Expecting value", text, begin)
        return found.end()
    depth = 0
    for mark in _BRACKETS.finditer(text, begin):
        sign = mark[0]
        depth += (sign in ("[", "{")) - (sign in ("]", "}"))
        if depth == 0:
            return mark.end()
    raise json.JSONDecodeError("it is nested too deeply, and does not end", text, begin)


def is_deep(value: object) -> bool:
    """Return whether a value has more than DEPTH lists and objects within each other."""
    inside = [value]
    for _ in range(DEPTH + 1):
        inside = [
            part
            for one in inside
            if isinstance(one, dict | list)
            for part in (one.values() if isinstance(one, dict) else one)
            if isinstance(part, dict | list)
        ]
        if not inside:
            return False
    return True


def reason(error: Exception) -> str:
    """Return why a value was not read, in words."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if not isinstance(error, json.JSONDecodeError):
        return "a number of thousands of digits"
    return f"{error.msg} (column {error.colno})"


_TOO_DEEP = f"it is nested more than {DEPTH} levels deep"


def _deep_columns(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        return {}
    return {name: _TOO_DEEP for name, column in value.items() if is_deep(column)}


def _shallow(value: object) -> object:
    """Return a value without what is too deep in it."""
    if isinstance(value, dict):
        return {name: None if is_deep(column) else column for name, column in value.items()}
    if is_deep(value):
        raise RecursionError
    return value


def _after_space(text: str, index: int) -> int:
    space = _SPACE.match(text, index)
    assert space is not None  # it matches nothing, too
    return space.end()
