"""Reading files of examples: the suffix decides the format, every row knows its line."""

from __future__ import annotations

import csv
import io
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from graft.data.sources.json_file import read_json, read_jsonl
from graft.data.sources.parquet import read_parquet
from graft.data.sources.record import Record
from graft.data.sources.stream import Stream, decode
from graft.errors import GraftError
from graft.files.digest import file_digest
from graft.text import listed, quoted

Reader = Callable[[Stream, Collection[str] | None], Iterator[Record]]


def read_records(path: str | Path, keys: Collection[str] | None = None) -> Iterator[Record]:
    """Yield every row of a .jsonl, .json, .csv, .parquet or .txt file, each also as .gz.

    keys: the keys whose values are asked for, by default all; of Parquet no others are read, and
    their values are None.
    A row that cannot be read has a problem. Raises GraftError, perhaps after some rows, when the
    file is missing, no regular file, empty, damaged, not UTF-8, of an unknown kind or beyond a
    bound.
    """
    path = Path(path)
    reader = _reader_for(path)
    with Stream(path) as stream:
        empty = True
        for record in reader(stream, keys):
            empty = False
            yield record
    if empty:
        found = "the file is empty" if stream.blank else "the file holds no rows"
        raise GraftError(f"{path}: {found}; expected at least one row")


def fingerprint(path: str | Path) -> str:
    """Return the SHA-256 of a regular file's bytes as 64 hexadecimal digits."""
    return file_digest(Path(path))


def _reader_for(path: Path) -> Reader:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    if suffix not in _READERS:
        found = f"unknown suffix {suffix!r}" if suffix else "the name has no suffix"
        known = ", ".join(_READERS)
        raise GraftError(f"{path}: {found}; expected one of {known}, each also as .gz")
    return _READERS[suffix]


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


def _read_csv(stream: Stream, keys: Collection[str] | None) -> Iterator[Record]:
    lines = _Lines(stream)
    rows = csv.reader(lines, strict=True)
    header = _cells(rows, f"{stream.path}:1") or []
    if not header and not stream.blank:
        raise GraftError(f"{stream.path}:1: a blank line; expected the names of the columns")
    doubled = sorted(name for name, count in Counter(header).items() if count > 1)
    if doubled:
        names = listed(map(quoted, doubled))
        raise GraftError(f"{stream.path}:1: the header names {names} twice; rename the columns")
    while True:
        where = f"{stream.path}:{lines.next_row()}"
        cells = _cells(rows, where)
        if cells is None:
            return
        if len(cells) == len(header):
            yield Record(where, dict(zip(header, cells, strict=True)))
        elif cells:
            problem = (
                f"{len(cells)} cells, but the header names {len(header)} columns "
                "(quote cells that hold commas or line breaks)"
            )
            yield Record(where, None, problem)


def _cells(rows: Iterator[list[str]], where: str) -> list[str] | None:
    """Return the next row, or None behind the last."""
    # The csv module's limit of 131,072 characters a cell is a process-wide setting.
    limit = csv.field_size_limit(sys.maxsize)
    try:
        return next(rows, None)
    except csv.Error as error:
        raise GraftError(f"{where}: not valid CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _read_txt(stream: Stream, keys: Collection[str] | None) -> Iterator[Record]:
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


def _text(line: bytes, stream: Stream, number: int) -> str:
    """Return a line of plain text; raises GraftError for what is none."""
    if b"\0" in line:
        raise GraftError(
            f"{stream.path}:{number}: a zero byte, so this is no UTF-8 text; if it is UTF-16, "
            "convert it with: iconv -f UTF-16 -t UTF-8"
        )
    return decode(line, stream.path, number)


_READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": _read_csv,
    ".parquet": read_parquet,
    ".txt": _read_txt,
}
