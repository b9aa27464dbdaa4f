"""Rows: which shape a row has, and whether it is complete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.data.shapes.base import type_in_words
from graft.data.shapes.registry import SHAPES
from graft.data.sources.files import Record, read_records
from graft.errors import GraftError, raise_problems

_MOST_LISTED = 20


@dataclass(frozen=True)
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
    """Read and check a file of examples.

    Raises GraftError that lists every bad row with file and line: unreadable rows, wrong
    keys, missing or empty values, and rows of another kind than the file's first good row.
    """
    records = read_records(path)
    problems = list(records.problems)
    rows: list[Row] = []
    ignored: set[str] = set()
    kind: str | None = None
    first = ""
    for record in records.rows:
        found = _kind_of(record, problems)
        if found is None or not isinstance(record.value, Mapping):
            continue
        if kind is None:
            kind, first = found, record.where
        if found != kind:
            problems.append(
                f"{record.where}: {_a(found)} row, but {first} is {_a(kind)} row; "
                "a file holds one kind of rows, so split it"
            )
            continue
        shape = SHAPES[kind]
        known = shape.required + shape.optional
        ignored.update(str(key) for key in record.value if key not in known)
        row = Row(record.where, shape.fields(record.value))
        problems += [f"{row.where}: {problem}" for problem in shape.problems(row.fields)]
        rows.append(row)
    raise_row_problems(problems, f"{path}: bad rows")
    assert kind is not None  # no problems and at least one record: some row had a kind
    return Rows(kind, rows, tuple(sorted(ignored)))


def raise_row_problems(problems: Sequence[str], heading: str) -> None:
    """Raise one GraftError that counts all problems and lists the first twenty."""
    more = len(problems) - _MOST_LISTED
    if more <= 0:
        raise_problems(problems, heading)
        return
    lines = "\n".join(f"  - {problem}" for problem in problems[:_MOST_LISTED])
    raise GraftError(f"{heading}: {len(problems)} problems\n{lines}\n  and {more} more")


def _kind_of(record: Record, problems: list[str]) -> str | None:
    if not isinstance(record.value, Mapping):
        found = type_in_words(record.value)
        problems.append(f"{record.where}: {found}; expected an object; {_accepted()}")
        return None
    kinds = [name for name in SHAPES if all(key in record.value for key in SHAPES[name].required)]
    found = ", ".join(map(str, record.value)) or "none"
    if len(kinds) == 1:
        return kinds[0]
    if kinds:
        problems.append(
            f"{record.where}: found keys {found}, which fit {' and '.join(kinds)} rows alike; "
            "remove the keys of all kinds but one"
        )
    else:
        problems.append(f"{record.where}: found keys {found}; {_accepted()}")
    return None


def _accepted() -> str:
    """Return which keys a row may have, in words."""
    choices = []
    for shape in SHAPES.values():
        perhaps = f" and perhaps {', '.join(shape.optional)}" if shape.optional else ""
        choices.append(", ".join(shape.required) + perhaps)
    return f"accepted keys of a row: {'; or '.join(choices)}"


def _a(kind: str) -> str:
    return f"{SHAPES[kind].article} {kind}"
