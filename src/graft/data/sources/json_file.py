"""JSON: a value in each line, or a list in one document, read item by item."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from graft.data.sources.record import Record
from graft.data.sources.stream import Stream, decode
from graft.errors import GraftError
from graft.text import listed

_SPACE = re.compile(r"[ \t\n\r]*")
_SHAPES = 'expected a list of objects, or {"data": [a list of objects]}'


def read_jsonl(stream: Stream, keys: object = None) -> Iterator[Record]:
    """Yield the value in every line that is not blank."""
    for number, line in stream.lines():
        text = decode(line, stream.path, number) if line else ""
        if text.strip():
            where = f"{stream.path}:{number}"
            try:
                yield Record(where, json.loads(text))
            except (ValueError, RecursionError) as error:
                yield Record(where, None, f"not valid JSON: {_reason(error)}")


def read_json(stream: Stream, keys: object = None) -> Iterator[Record]:
    """Yield the items of the list that a document is, or that stands in it under `data`."""
    document = _Document(decode(stream.whole(), stream.path), stream.path)
    if stream.blank:
        return
    try:
        if document.at("["):
            for line, value in document.items():
                yield Record(f"{stream.path}:{line}", value)
        else:
            yield from _data(document)
        document.end()
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else document.line()
        raise GraftError(f"{stream.path}:{line}: not valid JSON: {_reason(error)}") from error


def _data(document: _Document) -> Iterator[Record]:
    """Yield the items of an object's `data`, and pass over all else in it."""
    if not document.at("{"):
        found = type(document.value()).__name__
        document.end()
        raise GraftError(f"{document.path}: found {found}; {_SHAPES}")
    keys: list[str] = []
    is_list = False
    for key in document.members():
        if key == "data" and key in keys:
            raise GraftError(f"{document.path}:{document.line()}: the key 'data' stands here twice")
        if key == "data" and document.at("["):
            is_list = True
            for line, value in document.items():
                yield Record(f"{document.path}:{line}", value)
        else:
            document.value()
        keys.append(key)
    if not is_list:
        document.end()
        raise GraftError(f"{document.path}: an object with keys {listed(keys)}; {_SHAPES}")


class _Document:
    """A place in a JSON text that moves on; raises JSONDecodeError where the text is not JSON."""

    def __init__(self, text: str, path: Path) -> None:
        self.text = text
        self.path = path
        self._index = 0
        self._decoder = json.JSONDecoder()
        self._line, self._counted = 1, 0
        self._skip()

    def at(self, character: str) -> bool:
        """Return whether the next character is this one."""
        return self.text.startswith(character, self._index)

    def value(self) -> object:
        """Return the value that begins here."""
        value, self._index = self._decoder.raw_decode(self.text, self._index)
        self._skip()
        return value

    def items(self) -> Iterator[tuple[int, object]]:
        """Yield (line, value) for each item of the list that begins here."""
        if self._opens("]"):
            return
        while True:
            yield self.line(), self.value()
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
            key = str(self.value())
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


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if not isinstance(error, json.JSONDecodeError):  # a number of thousands of digits
        return str(error).split(";")[0]
    hint = "; if every line is one object, name the file .jsonl" if "Extra" in error.msg else ""
    return f"{error.msg} (column {error.colno}){hint}"
