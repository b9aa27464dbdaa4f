"""A row as its file holds it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True)
class Record:
    """One row, and where it stands: 'file:line'."""

    where: str
    value: object
    problem: str | None = None
    """Why it could not be read."""
    spoiled: Mapping[str, str] | None = None
    """Of a row that was read but for some columns: why each of them was not, by its name."""


class Layout(NamedTuple):
    """Columns that rows of one kind have. A file of columns is asked for those of a few kinds."""

    required: tuple[str, ...]
    keys: tuple[str, ...]
    """All that is read of such a row."""
    sure: bool = True
    """Whether the names alone decide, so that no further kind need be thought of."""


def chosen_columns(names: Sequence[str], layouts: Iterable[Sequence[Any]] | None) -> list[str]:
    """Return which columns of a file are read: those of the layouts that its rows may have.

    All are where no layout fits, so that a message can tell what there is.
    """
    if layouts is None:
        return list(dict.fromkeys(names))
    wanted: set[str] = set()
    for required, keys, sure in layouts:
        if set(required).issubset(names):
            wanted.update(keys)
            if sure:
                break
    return [name for name in dict.fromkeys(names) if name in wanted] or list(dict.fromkeys(names))


def without_nulls(value: Any) -> Any:
    """Return a value without the keys that are null, at any depth; items of lists are kept.

    Arrow gives every struct of a column all keys that any of them has, null where it has them not.
    """
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [without_nulls(one) for one in value]
    return value
