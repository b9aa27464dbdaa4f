"""Reading files of examples: the suffix decides the format, every row knows its line."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from graft.errors import GraftError


@dataclass(frozen=True)
class Record:
    """One row as the file holds it, and where it stands: 'file:line'."""

    where: str
    value: object


@dataclass
class Records:
    """The rows of a file, and one line of text for each row that could not be read."""

    rows: list[Record] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_records(path: str | Path) -> Records:
    """Return every row of a .jsonl, .json, .csv, .parquet or .txt file, each also as .gz.

    Raises GraftError when the file is missing, empty, damaged, not UTF-8 or of an unknown
    kind; rows that are wrong one by one come back as problems.
    """
    reader = _reader_for(Path(path))
    content = _read_bytes(Path(path))
    if not content.strip():
        raise GraftError(f"{path}: the file is empty; expected at least one row")
    records = reader(content, str(path))
    if not records.rows and not records.problems:
        raise GraftError(f"{path}: the file holds no rows; expected at least one")
    return records


def fingerprint(path: str | Path) -> str:
    """Return the SHA-256 of the file's bytes as 64 hexadecimal digits."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise GraftError(f"{path}: cannot read the file: {error.strerror}") from error


def _reader_for(path: Path) -> Callable[[bytes, str], Records]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    if suffix not in _READERS:
        found = f"unknown suffix {suffix!r}" if suffix else "the name has no suffix"
        known = ", ".join(_READERS)
        raise GraftError(f"{path}: {found}; expected one of {known}, each also as .gz")
    return _READERS[suffix]


def _read_bytes(path: Path) -> bytes:
    if not path.exists():
        raise GraftError(f"{path}: no such file; check the path")
    if path.is_dir():
        raise GraftError(f"{path}: this is a directory; expected a file of examples")
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix.lower() == ".gz" else content
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise GraftError(
            f"{path}: not a complete gzip file ({error}); download or compress it again"
        ) from error
    except OSError as error:
        raise GraftError(f"{path}: cannot read the file: {error.strerror}") from error


def _decode(content: bytes, path: str) -> str:
    try:
        # utf-8-sig: spreadsheets write a byte order mark, which must not enter the first key.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise GraftError(
            f"{path}:{line}: not UTF-8 (byte 0x{content[error.start]:02x}); convert the file, "
            "for example with: iconv -f LATIN1 -t UTF-8"
        ) from error


def _read_jsonl(content: bytes, path: str) -> Records:
    records = Records()
    # Not splitlines(): U+2028 and the like may stand inside a JSON string.
    for number, line in enumerate(_decode(content, path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.rows.append(Record(f"{path}:{number}", json.loads(line)))
        except json.JSONDecodeError as error:
            records.problems.append(
                f"{path}:{number}: not valid JSON: {error.msg} (column {error.colno})"
            )
    return records


def _read_json(content: bytes, path: str) -> Records:
    text = _decode(content, path)
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        hint = ""
        if error.msg == "Extra data":
            hint = "; if every line is one object, name the file .jsonl"
        raise GraftError(
            f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno}){hint}"
        ) from error
    if isinstance(document, dict) and not isinstance(document.get("data"), list):
        keys = ", ".join(document) or "none"
        raise GraftError(
            f"{path}: an object with keys {keys}; expected a list of objects, "
            'or {"data": [a list of objects]}'
        )
    if not isinstance(document, dict | list):
        raise GraftError(
            f"{path}: found {type(document).__name__}; expected a list of objects, "
            'or {"data": [a list of objects]}'
        )
    records = Records()
    line, counted = 1, 0
    for index, value in _list_items(text, isinstance(document, dict)):
        line += text.count("\n", counted, index)
        counted = index
        records.rows.append(Record(f"{path}:{line}", value))
    return records


def _list_items(text: str, in_object: bool) -> Iterator[tuple[int, object]]:
    """Yield (character position, value) of the list's items; text is known to be valid JSON."""
    decoder = json.JSONDecoder()
    index = _skip(text, 0, " \t\r\n")
    if in_object:
        index = _last_value_of_data(text, index, decoder)
    index = _skip(text, index + 1, " \t\r\n")
    while text[index] != "]":
        value, end = decoder.raw_decode(text, index)
        yield index, value
        index = _skip(text, end, " \t\r\n,")


def _last_value_of_data(text: str, index: int, decoder: json.JSONDecoder) -> int:
    """Return where the value of the key 'data' begins; the last wins, as in json.loads."""
    found = index
    index = _skip(text, index + 1, " \t\r\n")
    while text[index] != "}":
        key, end = decoder.raw_decode(text, index)
        index = _skip(text, end, " \t\r\n:")
        if key == "data":
            found = index
        _, end = decoder.raw_decode(text, index)
        index = _skip(text, end, " \t\r\n,")
    return found


def _skip(text: str, index: int, characters: str) -> int:
    while text[index] in characters:
        index += 1
    return index


def _read_csv(content: bytes, path: str) -> Records:
    text = _decode(content, path)
    # The csv module's limit of 131,072 characters a cell is a process-wide setting.
    limit = csv.field_size_limit(sys.maxsize)
    try:
        return _csv_records(text, path)
    finally:
        csv.field_size_limit(limit)


def _csv_records(text: str, path: str) -> Records:
    records = Records()
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    begin = 1
    try:
        header = next(reader)
        doubled = sorted({name for name in header if header.count(name) > 1})
        if doubled:
            names = ", ".join(map(repr, doubled))
            raise GraftError(f"{path}:1: the header names {names} twice; rename the columns")
        begin = reader.line_num + 1
        for cells in reader:
            where, begin = f"{path}:{begin}", reader.line_num + 1
            if len(cells) == len(header):
                records.rows.append(Record(where, dict(zip(header, cells, strict=True))))
            elif cells:
                records.problems.append(
                    f"{where}: {len(cells)} cells, but the header names {len(header)} columns "
                    "(quote cells that hold commas or line breaks)"
                )
    except csv.Error as error:
        raise GraftError(f"{path}:{begin}: not valid CSV: {error}") from error
    return records


def _read_parquet(content: bytes, path: str) -> Records:
    # Imported here because it is slow to load and most data is not Parquet.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(pa.BufferReader(content)).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise GraftError(f"{path}: not a readable Parquet file: {error}") from error
    return Records([Record(f"{path}:row {n}", row) for n, row in enumerate(rows, start=1)])


def _read_txt(content: bytes, path: str) -> Records:
    """Read documents that are separated by blank lines, one text row each."""
    records = Records()
    document: list[str] = []
    begin = 1
    for number, line in enumerate([*_decode(content, path).split("\n"), ""], start=1):
        line = line.removesuffix("\r")
        if line.strip():
            if not document:
                begin = number
            document.append(line)
        elif document:
            records.rows.append(Record(f"{path}:{begin}", {"text": "\n".join(document)}))
            document = []
    return records


_READERS: dict[str, Callable[[bytes, str], Records]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
