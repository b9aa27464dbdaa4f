"""JSON: a value in each line, or a list in one document, read item by item."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from graft.data.sources.json_values import Values, end_of, reason
from graft.data.sources.record import Record
from graft.data.sources.stream import Stream, decode
from graft.errors import GraftError
from graft.text import listed

_SPACE = re.compile(r"[ \t\n\r]*")
_SHOWN = 10_000
"""Characters of a line that is no row, for whoever passes over it."""
_WHITE = " \t\n\r"
_LINES = "; if every line is one object, name the file .jsonl, or pass --data-format jsonl"
_LISTS = ("data", "train", "rows", "examples", "instances")
"""Keys under which a document may hold its rows."""
_SHAPES = 'expected a list of objects, or {"data": [a list of objects]}'


def read_jsonl(stream: Stream, keys: object = None) -> Iterator[Record]:
    """Yield the value in every line that is not blank."""
    values = Values()
    for number, line in stream.lines():
        if not line or line.isspace():
            continue
        where = f"{stream.path}:{number}"
        try:
            text = decode(line, stream.path, number)
        except GraftError as error:
            shown = line[:_SHOWN].decode("utf-8", "replace")
            yield Record(where, shown, str(error).removeprefix(f"{where}: "))
            continue
        if (record := _line(values, where, text)) is not None:
            yield record


def _line(values: Values, where: str, text: str) -> Record | None:
    """Return the value of a line, or None for a blank one."""
    # A byte order mark begins a line where files were put together.
    begin = len(text) - len(text.lstrip(f"{_WHITE}\ufeff"))
    if begin == len(text):
        return None
    try:
        value, spoiled, end = values.decode(text, begin)
        if end < len(text) and text[end:].strip(_WHITE):
            raise json.JSONDecodeError("Extra data", text, end)
    except (ValueError, RecursionError) as error:
        return Record(where, text[:_SHOWN], f"not valid JSON: {reason(error)}")
    return Record(where, value, None, spoiled or None)


def read_json(stream: Stream, keys: object = None) -> Iterator[Record]:
    """Yield the items of the list that a document is, or that stands in it under `data`.

    One that is an object in every line is read as such.
    """
    text = decode(stream.whole(), stream.path)
    if stream.blank:
        return
    if _is_lines(text):
        values = Values()
        for number, line in enumerate(text.split("\n"), start=1):
            if (record := _line(values, f"{stream.path}:{number}", line)) is not None:
                yield record
        return
    document = _Document(text, stream.path)
    try:
        if document.at("["):
            yield from document.records()
        else:
            yield from _data(document)
        document.end()
    except (ValueError, RecursionError) as error:
        place = error.lineno if isinstance(error, json.JSONDecodeError) else document.line()
        hint = _LINES if isinstance(error, json.JSONDecodeError) and "Extra" in error.msg else ""
        raise GraftError(f"{stream.path}:{place}: not valid JSON: {reason(error)}{hint}") from error


def _is_lines(text: str) -> bool:
    """Return whether an object ends in the first line and another begins in the next."""
    first, _, rest = text[: 2**26].lstrip(_WHITE).partition("\n")
    return first[:1] == "{" and first.rstrip(_WHITE)[-1:] == "}" and rest.lstrip(_WHITE)[:1] == "{"


def _data(document: _Document) -> Iterator[Record]:
    """Yield the items of the list that an object has under `data`; all else is passed over.

    The list may be under one of a few other names.
    """
    if not document.at("{"):
        found = type(document.value()[0]).__name__
        document.end()
        raise GraftError(f"{document.path}: found {found}; {_SHAPES}")
    keys: list[str] = []
    found_in = ""
    for key in document.members():
        if key in _LISTS and key in keys:
            raise GraftError(
                f"{document.path}:{document.line()}: the key {key!r} stands here twice"
            )
        if key in _LISTS and document.at("["):
            if found_in:
                raise GraftError(
                    f"{document.path}:{document.line()}: lists of rows under {found_in!r} and "
                    f"{key!r}; give a file for each"
                )
            found_in = key
            yield from document.records()
        else:
            document.skip()
        keys.append(key)
    if not found_in:
        document.end()
        raise GraftError(f"{document.path}: an object with keys {listed(keys)}; {_SHAPES}")


class _Document:
    """A place in a JSON text that moves on; raises JSONDecodeError where the text is not JSON."""

    def __init__(self, text: str, path: Path) -> None:
        self.text = text
        self.path = path
        self._index = 0
        self._values = Values()
        self._line, self._counted = 1, 0
        self._skip()

    def at(self, character: str) -> bool:
        """Return whether the next character is this one."""
        return self.text.startswith(character, self._index)

    def value(self) -> tuple[object, Mapping[str, str]]:
        """Return the value that begins here, and its spoiled columns."""
        value, spoiled, self._index = self._values.decode(self.text, self._index)
        self._skip()
        return value, spoiled

    def skip(self) -> None:
        """Pass the value that begins here, whatever it holds."""
        try:
            self.value()
        except json.JSONDecodeError:
            raise
        except (ValueError, RecursionError):
            self._index = end_of(self.text, self._index)
            self._skip()

    def records(self) -> Iterator[Record]:
        """Yield a record for each item of the list that begins here."""
        if self._opens("]"):
            return
        while True:
            where = f"{self.path}:{self.line()}"
            try:
                value, spoiled = self.value()
            except json.JSONDecodeError:
                raise
            except (ValueError, RecursionError) as error:
                self._index = end_of(self.text, self._index)
                self._skip()
                yield Record(where, None, f"not valid JSON: {reason(error)}")
            else:
                yield Record(where, value, None, spoiled or None)
            if self._expect(",]") == "]":
                return

    def members(self) -> Iterator[str]:
        """Yield each key of the object that begins here; read its value before the next."""
        if self._opens("}"):
            return
        while True:
            if not self.at('"'):
                problem = "Expecting property name enclosed in double quotes"
                raise json.JSONDecodeError(problem, self.text, self._index)
            key = str(self.value()[0])
            self._expect(":")
            yield key
            if self._expect(",}") == "}":
                return

    def line(self) -> int:
        """Return the number of the line here."""
        self._line += self.text.count("\n", self._counted, self._index)
        self._counted = self._index
        return self._line

    def end(self) -> None:
        """Pass the end of the text."""
        if self._index < len(self.text):
            raise json.JSONDecodeError("Extra data", self.text, self._index)

    def _opens(self, end: str) -> bool:
        """Enter a list or an object, and return whether it is empty."""
        self._index += 1
        self._skip()
        if self.at(end):
            self._expect(end)
            return True
        return False

    def _expect(self, characters: str) -> str:
        found = self.text[self._index : self._index + 1]
        if not found or found not in characters:
            raise json.JSONDecodeError(
                f"Expecting {characters[0]!r} delimiter", self.text, self._index
            )
        self._index += 1
        self._skip()
        return found

    def _skip(self) -> None:
        space = _SPACE.match(self.text, self._index)
        assert space is not None  # it matches nothing, too
        self._index = space.end()
