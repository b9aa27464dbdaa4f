"""A row as its file holds it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Record:
    """One row, and where it stands: 'file:line'."""

    where: str
    value: object
    problem: str | None = None
    """Why it could not be read."""
