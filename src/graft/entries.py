"""A table of what an axis offers by name: formats, methods, starts, targets ..."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Generic, TypeVar

from graft.errors import GraftError, did_you_mean
from graft.text import quoted

Entry = TypeVar("Entry")


class Listed:
    """An entry that is imported when it is first asked for.

    A plain class, as every command reads this file: a named tuple takes a millisecond to make.
    """

    def __init__(self, place: str, summary: str = "") -> None:
        self.place = place
        """'package.module:NAME'."""
        self.summary = summary
        """What a flag's help says of it, in half a line."""


class Entries(Generic[Entry]):
    """The entries of one axis by name.

    The table itself imports nothing, so a configuration that names its choices stays quick to load:
    `Annotated[str, METHODS]` is the type of a field whose value is one of the names.
    """

    def __init__(self, kind: str, listed: Mapping[str, Listed]) -> None:
        self.kind = kind
        """What an entry is, in a message."""
        self._listed = dict(listed)
        self._loaded: dict[str, Entry] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._listed)

    def __len__(self) -> int:
        return len(self._listed)

    def __contains__(self, name: object) -> bool:
        return name in self._listed

    def __repr__(self) -> str:
        return f"Entries({self.kind!r}: {', '.join(self)})"

    def __getitem__(self, name: str) -> Entry:
        """Return an entry; raises GraftError with the nearest name that there is."""
        if name not in self._loaded:
            problem = self.problem(name)
            if problem is not None:
                raise GraftError(problem)
            module, _, attribute = self._listed[name].place.partition(":")
            self._loaded[name] = getattr(import_module(module), attribute)
        return self._loaded[name]

    def values(self) -> list[Entry]:
        """Return every entry, imported, in the order of the table."""
        return [self[name] for name in self]

    def summary(self, name: str) -> str:
        """Return what is said of an entry, without importing it."""
        return self._listed[name].summary

    def problem(self, name: str) -> str | None:
        """Return what is wrong with a name, or None for one that there is."""
        if name in self:
            return None
        return f"unknown {self.kind} {quoted(name)}{did_you_mean(name, self)}"

    def add(self, name: str, entry: Entry, summary: str = "") -> None:
        """Add an entry that is imported already; raises ValueError when its name is taken."""
        if name in self:
            raise ValueError(f"{self.kind} {name!r} is there already")
        self._listed[name] = Listed("", summary)
        self._loaded[name] = entry

    def remove(self, name: str) -> None:
        """Take an entry out again."""
        del self._listed[name]
        self._loaded.pop(name, None)
