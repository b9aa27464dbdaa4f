"""Rows that a training goes on without: which, why, and how many are too many."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from graft.errors import GraftError
from graft.text import quoted

_MOST_KEPT = 10_000
"""Rows of which more is kept than their number."""
_MOST_CHARACTERS = 10_000
"""Characters of a row that are kept."""
_SHARE = 0.5
"""Share of the rows up to which a file is worth its other rows."""
_SHOWN = 20
_PLACE = re.compile(r"(.*?:(?:row )?\d+): ", re.DOTALL)
"""Where a row stands, at the beginning of a problem."""


class Row(Protocol):
    """What is asked of a checked row."""

    @property
    def where(self) -> str:
        """Where it stands."""

    @property
    def fields(self) -> Mapping[str, Any]:
        """What is there."""


class Skipped:
    """Rows that are skipped, in the order in which they were found."""

    def __init__(self) -> None:
        self.count = 0
        self._kept: list[dict[str, str]] = []
        self._rows: dict[str, str] = {}
        """What is there, as JSON, by its place."""
        self._last = ""

    def take(self, problem: str, where: str, row: object) -> None:
        """Take a row; a second problem of the same row says more of it."""
        if not where:
            place = _PLACE.match(problem)
            where = problem if place is None else place[1]
        reason = problem.removeprefix(f"{where}: ")
        if where == self._last:
            if self._kept and self._kept[-1]["where"] == where:
                self._kept[-1]["reason"] += f"; {reason}"
            return
        self._last = where
        self.count += 1
        if len(self._kept) < _MOST_KEPT:
            self._kept.append({"where": where, "reason": reason})
            if row is not None:
                self._rows[where] = _text(row)

    def complete(self, rows: Iterable[Row]) -> None:
        """Take what is there of rows that were taken by their place alone."""
        lost = {one["where"] for one in self._kept}.difference(self._rows)
        for row in rows if lost else ():
            if row.where in lost:
                self._rows[row.where] = _text(dict(row.fields))

    def lines(self) -> str:
        """Return a line of JSON for each row, with where it stands, why it is bad, and the row.

        A long row is cut, and so a text.
        """
        lines = []
        for one in self._kept:
            row = self._rows.get(one["where"], "null")
            row = row if len(row) <= _MOST_CHARACTERS else json.dumps(row[:_MOST_CHARACTERS])
            lines.append(f'{json.dumps(one)[:-1]}, "row": {row}}}\n')
        return "".join(lines)

    def check(self, good: int, heading: str) -> None:
        """Raise GraftError when more rows are skipped than are left."""
        if self.count <= _SHARE * (self.count + good):
            return
        first = "\n".join(f"  - {one['where']}: {one['reason']}" for one in self._kept[:_SHOWN])
        raise GraftError(
            f"{heading}: {self.count:,} of {self.count + good:,} rows are bad, which "
            f"--skip-bad-rows does not pass over\n{first}"
        )

    def notes(self) -> tuple[str, ...]:
        """Return how many rows were skipped, and why the first of them."""
        if not self.count:
            return ()
        rows = "row is" if self.count == 1 else "rows are"
        first = self._kept[0]
        note = (
            f"{self.count:,} bad {rows} skipped (skipped.jsonl in a run's folder); the first: "
            f"{first['where']}: {first['reason'][:300]}"
        )
        return (note,)


def _text(row: object) -> str:
    """Return a row as JSON, or the beginning of one that is too long to be kept."""
    try:
        return json.dumps(row, default=repr)[: _MOST_CHARACTERS + 1]
    except (ValueError, RecursionError):
        return json.dumps(quoted(row))
