"""Rows: which shape a row has, and whether it is complete."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.data.shapes.base import type_in_words
from graft.data.shapes.registry import SHAPES
from graft.data.sources.files import read_records
from graft.data.sources.record import Record
from graft.errors import GraftError, raise_problems
from graft.text import listed

_MOST_LISTED = 20
_MOST_COUNTED = 10_000


@dataclass(frozen=True, slots=True)
class Row:
    """A checked row: where it stands and the values of its shape's keys."""

    where: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Rows:
    """All rows of a file: one kind, at least one row, and the keys that nobody reads."""

    kind: str
    """The name of their shape."""
    rows: list[Row]
    ignored_keys: tuple[str, ...]


def read_rows(path: str | Path) -> Rows:
    """Read and check a file of examples; raises GraftError as `RowStream` does."""
    stream = RowStream(path)
    rows = list(stream)
    return Rows(stream.kind, rows, stream.ignored_keys)


class RowStream:
    """The rows of a file, read and checked while they are asked for."""

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self.kind = ""
        """The name of their shape, known from the first row on."""
        self._ignored: set[str] = set()
        self._first = ""

    @property
    def ignored_keys(self) -> tuple[str, ...]:
        """The keys that nobody reads, of the rows so far."""
        return tuple(sorted(self._ignored))

    def __iter__(self) -> Iterator[Row]:
        """Yield the rows up to the first bad one; then look for all that are bad.

        Raises GraftError that lists every bad row with file and line: unreadable rows, wrong
        keys, missing or empty values, and rows of another kind than the file's first good row.
        """
        problems = RowProblems(f"{self.path}: bad rows")
        asked = {key for shape in SHAPES.values() for key in shape.required + shape.optional}
        for record in read_records(self.path, asked):
            row = self._checked(record, problems)
            if row is not None and not problems:
                yield row
        problems.raise_all()

    def _checked(self, record: Record, problems: RowProblems) -> Row | None:
        """Return a record as a row; None, and what is wrong with it, for one that is bad."""
        found, problem = _kind_of(record)
        if not isinstance(record.value, Mapping) or found is None:
            problems.add(f"{record.where}: {problem}")
            return None
        if not self.kind:
            self.kind, self._first = found, record.where
        if found != self.kind:
            problems.add(
                f"{record.where}: {_a(found)} row, but {self._first} is {_a(self.kind)} row; "
                "a file holds one kind of rows, so split it"
            )
            return None
        shape = SHAPES[found]
        known = shape.required + shape.optional
        self._ignored.update(str(key) for key in record.value if key not in known)
        row = Row(record.where, shape.fields(record.value))
        for wrong in shape.problems(row.fields):
            problems.add(f"{row.where}: {wrong}")
        return row


class RowProblems:
    """Problems of rows: the first twenty of them, and how many there are."""

    def __init__(self, heading: str) -> None:
        self._heading = heading
        self._first: list[str] = []
        self._count = 0

    def __bool__(self) -> bool:
        return self._count > 0

    def add(self, problem: str) -> None:
        """Take a problem, which begins with its row's file and line; raise all when there are many.

        Rows that are wrong one and all are not read to the end of a large file.
        """
        self._count += 1
        if self._count <= _MOST_LISTED:
            self._first.append(problem)
        if self._count == _MOST_COUNTED:
            self.raise_all()

    def raise_all(self) -> None:
        """Raise one GraftError that counts all problems, or return when there is none."""
        more = self._count - _MOST_LISTED
        if more <= 0:
            raise_problems(self._first, self._heading)
            return
        lines = "\n".join(f"  - {problem}" for problem in self._first)
        perhaps = "at least " if self._count == _MOST_COUNTED else ""
        raise GraftError(
            f"{self._heading}: {perhaps}{self._count} problems\n{lines}\n  and {more} more"
        )


def _kind_of(record: Record) -> tuple[str | None, str | None]:
    """Return the name of a row's shape, or what is wrong with the row."""
    if record.problem is not None:
        return None, record.problem
    if not isinstance(record.value, Mapping):
        return None, f"{type_in_words(record.value)}; expected an object; {_accepted()}"
    kinds = [name for name in SHAPES if all(key in record.value for key in SHAPES[name].required)]
    if len(kinds) == 1:
        return kinds[0], None
    found = listed(record.value)
    if kinds:
        return None, (
            f"found keys {found}, which fit {' and '.join(kinds)} rows alike; "
            "remove the keys of all kinds but one"
        )
    return None, f"found keys {found}; {_accepted()}"


def _accepted() -> str:
    """Return which keys a row may have, in words."""
    choices = []
    for shape in SHAPES.values():
        perhaps = f" and perhaps {', '.join(shape.optional)}" if shape.optional else ""
        choices.append(", ".join(shape.required) + perhaps)
    return f"accepted keys of a row: {'; or '.join(choices)}"


def _a(kind: str) -> str:
    return f"{SHAPES[kind].article} {kind}"
