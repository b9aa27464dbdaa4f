"""A row as its file holds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Record:
    """One row, and where it stands: 'file:line'."""

    where: str
    value: object
    problem: str | None = None
    """Why it could not be read."""


def without_nulls(value: Any) -> Any:
    """Return a value without the keys that are null, at any depth; items of lists are kept.

    Arrow gives every struct of a column all keys that any of them has, null where it has them not.
    """
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [without_nulls(one) for one in value]
    return value
