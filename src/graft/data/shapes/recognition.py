"""Recognising rows: the layout of each, and what it is under the keys of a shape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from graft.data.shapes.base import Holds, type_in_words
from graft.data.shapes.columns import Columns, renaming
from graft.data.shapes.layouts import RowLayout, layouts
from graft.data.shapes.registry import SHAPES
from graft.data.sources.record import Layout
from graft.errors import GraftError
from graft.text import listed, quoted

_REMEMBERED = 1000
"""Most sets of keys that a file may have before they are thought over again."""


class Recogniser:
    """Recognises the rows of one file; rows that have the same keys are looked up."""

    def __init__(self, columns: Iterable[str] = (), holds: Sequence[Holds] = ("answers",)) -> None:
        """Take the words of --columns; raises GraftError for those that mean nothing.

        holds: what there is to learn from the rows; others are refused.
        """
        known = layouts(holds)
        self._holds = holds
        self.columns = Columns(columns, known)
        self._layouts = self.columns.layouts() if self.columns else known
        self._known: dict[tuple[str, ...], tuple[RowLayout, ...]] = {}
        self.ignored: set[str] = set()
        """Keys that nobody has read so far."""
        self.said: dict[str, None] = {}
        """What a user should know of how the rows are read."""
        self._seen: set[tuple[tuple[str, ...], int]] = set()
        self._first = True
        self._told = False
        self._layout: RowLayout | None = None

    def needed(self) -> list[Layout]:
        """Return the columns to read of a file of columns."""
        return self.columns.needed()

    def recognise(
        self, row: Mapping[str, Any], spoiled: Mapping[str, str] | None
    ) -> tuple[str, Mapping[str, Any]]:
        """Return the name of a row's shape and the row under its keys.

        spoiled: why columns of it could not be read. Raises GraftError for a row that no layout
        fits, and for one with a spoiled column that is needed.
        """
        given = row
        if self.columns:
            if self._first and (absent := self.columns.absent(row)) is not None:
                raise ColumnsError(absent)
            row = self.columns.renamed(row)
            spoiled = None if spoiled is None else self.columns.spoiled(spoiled)
        self._first = False
        keys = tuple(row)
        candidates = self._known.get(keys)
        if candidates is None:
            candidates = self._remember(keys)
        for layout in candidates:
            if layout.fits is None or layout.fits(row):
                break
        else:
            if (absent := self.columns.absent(given)) is not None:
                raise GraftError(absent)
            why = f", of which {_misfit(candidates[0], row)}" if candidates else ""
            raise GraftError(f"found keys {listed(given)}{why}{self._how(given)}")
        if spoiled is not None:
            for key in layout.keys:
                if key in spoiled:
                    raise GraftError(f"{key!r}: {spoiled[key]}")
        if (keys, id(layout)) not in self._seen:
            self._note(keys, layout)
        self._layout = layout
        return layout.kind, row if layout.convert is None else layout.convert(row)

    def in_columns(self, problem: str) -> str:
        """Return a problem of the last row, which begins with a key, with the key's column."""
        key = problem[1 : problem.find("'", 1)] if problem.startswith("'") else ""
        if not key or self._layout is None:
            return problem
        column = self.columns.column_of(self._layout.columns.get(key, key))
        if column == key:
            return problem
        return f"{key!r} (column {quoted(column)}){problem[len(key) + 2 :]}"

    def _how(self, row: Mapping[str, Any]) -> str:
        """Return which keys a row may have, and what names those of this one; once for a file."""
        if self._told:
            return ""
        self._told = True
        # Of a row among others that are fine the names of the columns are not what is wrong.
        return f"; {_accepted(self._holds)}" + ("" if self._seen else f"; {renaming(row)}")

    def _remember(self, keys: tuple[str, ...]) -> tuple[RowLayout, ...]:
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
            self._seen.clear()
        found = set(keys)
        candidates = tuple(one for one in self._layouts if found.issuperset(one.required))
        self._known[keys] = candidates
        return candidates

    def _note(self, keys: tuple[str, ...], layout: RowLayout) -> None:
        self._seen.add((keys, id(layout)))
        self.ignored.update(set(keys).difference(layout.keys))
        if layout.said is not None:
            self.said[layout.said] = None


class ColumnsError(GraftError):
    """--columns names a column that the first row does not have."""


def not_a_row(value: object) -> str:
    """Return what is wrong with a value that is no object, and so no row."""
    remedy = ""
    if isinstance(value, str):
        remedy = '; make it {"text": ...}'
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        remedy = "; if those are its rows, name the file .json, or pass --data-format json"
        if not {"role", "from"}.isdisjoint(value[0]):
            remedy = '; make it {"messages": [...]}'
    return f"{type_in_words(value)}; expected an object{remedy}; {_accepted()}"


def _misfit(layout: RowLayout, row: Mapping[str, Any]) -> str:
    """Return what has another type than a layout's rows."""
    key = layout.required[0]
    return f"{key!r} is {type_in_words(row[key])}, and no conversation"


def _accepted(holds: Sequence[Holds] = ("answers",)) -> str:
    """Return which keys a row may have, in words."""
    choices = []
    for shape in (one for one in SHAPES.values() if one.holds in holds):
        perhaps = f" and perhaps {', '.join(shape.optional)}" if shape.optional else ""
        choices.append(", ".join(shape.required) + perhaps)
    return f"accepted keys of a row: {'; or '.join(choices)}"
