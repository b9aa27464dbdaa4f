"""Plain text: documents between blank lines, and rows of cells as spreadsheets write them."""

from __future__ import annotations

import csv
import io
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from graft.data.sources.record import Record
from graft.data.sources.stream import Stream, decode
from graft.errors import GraftError


def read_csv(stream: Stream, keys: object = None) -> Iterator[Record]:
    """Yield the rows below a header, cells apart by commas."""
    return _read_cells(stream, "CSV")


def read_tsv(stream: Stream, keys: object = None) -> Iterator[Record]:
    """Yield the rows below a header, cells apart by tabs."""
    return _read_cells(stream, "TSV", delimiter="\t")


def read_text(stream: Stream, keys: object = None) -> Iterator[Record]:
    """Yield documents that are separated by blank lines, one text row each."""
    document: list[str] = []
    begin = size = 0
    for number, content in stream.lines():
        line = _text(content, stream, number).removesuffix("\r") if content else ""
        if line.strip():
            if not document:
                begin, size = number, 0
            document.append(line)
            size += len(content)
            if size > stream.most_row:
                stream.refuse_long(begin, "document (blank lines separate them)")
        elif document:
            yield Record(f"{stream.path}:{begin}", {"text": "\n".join(document)})
            document = []
    if document:
        yield Record(f"{stream.path}:{begin}", {"text": "\n".join(document)})


class _Lines:
    """Lines of text as the csv module takes them, and how many bytes a row has so far."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.number = 0
        """That of the line which was read last."""
        self._begin = 1
        self._bytes = 0

    def __iter__(self) -> Iterator[str]:
        for number, line in self._stream.lines():
            self._bytes += len(line)
            if self._bytes > self._stream.most_row:
                self._stream.refuse_long(self._begin, "row")
            text = _text(line, self._stream, number) + "\n"
            # An old Mac's lines end in a carriage return.
            for part in io.StringIO(text, newline="") if "\r" in text[:-2] else (text,):
                self.number += 1
                yield part

    def next_row(self) -> int:
        """Begin a row, and return its line."""
        self._begin, self._bytes = self.number + 1, 0
        return self._begin


def _read_cells(stream: Stream, kind: str, **dialect: Any) -> Iterator[Record]:
    lines = _Lines(stream)
    rows = csv.reader(lines, strict=True, **dialect)
    header = _cells(rows, f"{stream.path}:1", kind) or []
    if not header and not stream.blank:
        raise GraftError(f"{stream.path}:1: a blank line; expected the names of the columns")
    between, odds = ("tabs", ";,|") if dialect else ("commas", ";\t|")
    if len(header) == 1 and (odd := next((one for one in odds if one in header[0]), None)):
        remedy = "csv for commas" if dialect else "tsv for tabs"
        raise GraftError(
            f"{stream.path}:1: the header is one cell, with {odd!r} in it, so cells are not apart "
            f"by {between}; save it so, or pass --data-format {remedy}"
        )
    doubled = (name for name, count in Counter(header).items() if count > 1)
    spoiled = dict.fromkeys(doubled, "the header names it twice; rename one of the two") or None
    while True:
        where = f"{stream.path}:{lines.next_row()}"
        cells = _cells(rows, where, kind)
        if cells is None:
            return
        if len(cells) == len(header):
            yield Record(where, dict(zip(header, cells, strict=True)), None, spoiled)
        elif cells:
            problem = (
                f"{len(cells)} cells, but the header names {len(header)} columns "
                f"(quote cells that hold {between} or line breaks)"
            )
            yield Record(where, cells, problem)


def _cells(rows: Iterator[list[str]], where: str, kind: str) -> list[str] | None:
    """Return the next row, or None behind the last."""
    # The csv module's limit of 131,072 characters a cell is a process-wide setting.
    limit = csv.field_size_limit(sys.maxsize)
    try:
        return next(rows, None)
    except csv.Error as error:
        raise GraftError(f"{where}: not valid {kind}: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _text(line: bytes, stream: Stream, number: int) -> str:
    """Return a line of plain text; raises GraftError for what is none."""
    if b"\0" in line:
        raise GraftError(
            f"{stream.path}:{number}: a zero byte, so this is no text; if it is, save it as UTF-8"
        )
    return decode(line, stream.path, number)
