"""Reading files of examples: the suffix decides the format, every row knows its line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from graft.data.sources.json_file import read_json, read_jsonl
from graft.data.sources.parquet import read_arrow, read_parquet
from graft.data.sources.record import Layout, Record
from graft.data.sources.stream import Stream
from graft.data.sources.text_file import read_csv, read_text, read_tsv
from graft.errors import GraftError, did_you_mean
from graft.text import quoted

Reader = Callable[[Stream, Sequence[Layout] | None], Iterator[Record]]


def read_records(
    path: str | Path, layouts: Sequence[Layout] | None = None, data_format: str | None = None
) -> Iterator[Record]:
    """Yield every row of a file, plain or as .gz, in the format that its suffix or a name says.

    layouts: which columns are read of Parquet and Arrow, by default all; see `Layout`. The values
    of the others are None.
    A row that cannot be read has a problem. Raises GraftError, perhaps after some rows, when the
    file is missing, no regular file, empty, damaged, no text, of an unknown kind or beyond a
    bound.
    """
    path = Path(path)
    reader = _READERS[format_of(path) if data_format is None else checked_format(data_format)]
    with Stream(path) as stream:
        empty = True
        for record in reader(stream, layouts):
            empty = False
            yield record
    if empty:
        found = "the file is empty" if stream.blank else "the file holds no rows"
        raise GraftError(f"{path}: {found}; expected at least one row")


def checked_format(name: str) -> str:
    """Return the name of a format; raises GraftError when there is none such."""
    if name not in _READERS:
        raise GraftError(f"--data-format {quoted(name)} is unknown{did_you_mean(name, _READERS)}")
    return name


def format_of(path: Path) -> str:
    """Return the format that a file's suffix stands for; raises GraftError when it says nothing."""
    known = known_format(path)
    if known is not None:
        return known
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    if suffix in _PACKED:
        raise GraftError(
            f"{path}: files packed as {suffix} are not read; unpack it with: {_PACKED[suffix]}"
        )
    found = f"unknown suffix {suffix!r}" if suffix else "the name has no suffix"
    raise GraftError(
        f"{path}: {found}; expected one of {', '.join(SUFFIXES)}, each also as .gz; or say what "
        f"it holds, as in --data-format text (or {', '.join(list(_READERS)[1:])})"
    )


def known_format(path: Path) -> str | None:
    """Return the format that a file's suffix stands for, or None when it says nothing."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


_READERS: dict[str, Reader] = {
    "text": read_text,
    "jsonl": read_jsonl,
    "json": read_json,
    "csv": read_csv,
    "tsv": read_tsv,
    "parquet": read_parquet,
    "arrow": read_arrow,
}
FORMATS = tuple(_READERS)
"""The names that --data-format takes."""
SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".txt": "text",
}
"""Which format the end of a file's name stands for."""
_PACKED = {
    ".zst": "zstd -d FILE",
    ".bz2": "bunzip2 FILE",
    ".xz": "unxz FILE",
    ".zip": "unzip FILE",
    ".tar": "tar -xf FILE",
    ".7z": "7z x FILE",
}
