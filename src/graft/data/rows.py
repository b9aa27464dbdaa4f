"""Rows: which shape a row has, and whether it is complete."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.data.config import DataConfig
from graft.data.shapes.base import Holds
from graft.data.shapes.conversions import LEFT_OUT, as_conversation, can_talk
from graft.data.shapes.recognition import ColumnsError, Recogniser, not_a_row
from graft.data.shapes.registry import SHAPES
from graft.data.skipped import Skipped
from graft.data.sources.files import known_format
from graft.data.sources.places import sources_of
from graft.data.sources.record import Record
from graft.errors import GraftError, raise_problems
from graft.text import listed

_MOST_LISTED = 20
_MOST_COUNTED = 10_000


@dataclass(frozen=True)
class Reading:
    """How files are read; see `DataConfig`."""

    columns: tuple[str, ...] = ()
    data_format: str | None = None
    skip_bad_rows: bool = False
    holds: tuple[Holds, ...] = ("answers",)
    """What there is to learn from the rows."""

    @classmethod
    def of(cls, path: str, config: DataConfig, holds: tuple[Holds, ...] = ("answers",)) -> Reading:
        """Return how the flags say that a file is read.

        --data-format is for --data, and for another file whose suffix does not say what it holds.
        """
        data_format = config.data_format
        if path != config.data and known_format(Path(path)) is not None:
            data_format = None
        return cls(config.columns, data_format, config.skip_bad_rows, holds)


_AS_IT_IS = Reading()


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
    notes: tuple[str, ...] = ()
    """What a user should know of how the rows were read."""
    skipped: Skipped | None = None
    """The bad rows that were passed over; None where they are refused."""


def read_rows(path: str | Path, reading: Reading = _AS_IT_IS) -> Rows:
    """Read and check a file of examples; see `RowStream`, and raises GraftError as that does."""
    stream = RowStream(path, reading)
    rows = list(stream)
    return Rows(stream.kind, rows, stream.ignored_keys, stream.notes, stream.skipped)


class RowStream:
    """The rows of what --data names, read and checked while they are asked for."""

    def __init__(self, path: str | Path, reading: Reading = _AS_IT_IS) -> None:
        """Look which files there are; raises GraftError for flags that mean nothing."""
        self.path = path
        self.kind = ""
        """The name of their shape, known from the first row on."""
        self.skipped = Skipped() if reading.skip_bad_rows else None
        """Takes the rows that are bad; None where they are refused."""
        self._holds = reading.holds
        self._sources = sources_of(path, reading.columns, reading.data_format)
        self._ignored: set[str] = set()
        self._said: dict[str, None] = {}
        self._first = ""
        self._left_out = 0

    @property
    def ignored_keys(self) -> tuple[str, ...]:
        """The keys that nobody reads, of the rows so far."""
        return tuple(sorted(self._ignored))

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how the rows so far were read."""
        left_out = (
            [f"{self._left_out:,} row{'s are' if self._left_out > 1 else ' is'} left out"]
            if self._left_out
            else []
        )
        return (*self._said, *left_out)

    def __iter__(self) -> Iterator[Row]:
        """Yield the rows up to the first bad one; then look for all that are bad.

        Where bad rows are skipped, yield all that are good. Raises GraftError that lists every
        bad row with file and line: unreadable rows, wrong keys, missing or empty values, and rows
        of another kind than the file's first good row.
        """
        problems = RowProblems(f"{self.path}: bad rows", self.skipped)
        count = 0
        self.kind = self._common_kind()
        for source in self._sources:
            recogniser = Recogniser(source.columns, self._holds)
            if source.said is not None:
                self._said[source.said] = None
            for record in source.records(recogniser.needed()):
                row = self._checked(record, recogniser, problems)
                if row is not None and not problems:
                    count += 1
                    yield row
            recogniser.columns.check_found(source.name)
            self._ignored |= recogniser.ignored
            self._said |= recogniser.said
        problems.raise_all()
        if self.skipped is not None:
            self.skipped.check(count, str(self.path))
        if count == 0:
            raise GraftError(f"{self.path}: all of its rows are left out, so none can be trained")

    def _common_kind(self) -> str:
        """Return the kind that the rows of a mixture become, or '' where the first row says it."""
        kinds: dict[str, str] = {}
        for source in self._sources if any(one.is_mixed for one in self._sources) else ():
            recogniser = Recogniser(source.columns, self._holds)
            for record in source.records(recogniser.needed()):
                found = self._recognised(record, recogniser, RowProblems(""))
                if found is not None:
                    kinds.setdefault(found[0], record.where)
                    break
        if len(kinds) < 2:
            return ""
        talks = [kind for kind in SHAPES if SHAPES[kind].is_conversation]
        talks = [kind for kind in talks if SHAPES[kind].holds == "answers"]
        plain = [kind for kind in kinds if kind not in talks and not can_talk(kind)]
        if plain:
            others = listed(f"{where} is {_a(kind)} row" for kind, where in kinds.items())
            raise GraftError(
                f"{self.path}: {others}; {plain[0]} rows are mixed with their like alone, as "
                "they are no question and answer"
            )
        self._said["rows of several kinds are mixed, and all are read as messages"] = None
        return talks[0]

    def _recognised(
        self, record: Record, recogniser: Recogniser, problems: RowProblems
    ) -> tuple[str, Mapping[str, Any]] | None:
        """Return the kind of a record and its fields; None for one that is bad, or left out."""
        problem = record.problem
        if problem is None and not isinstance(record.value, Mapping):
            problem = not_a_row(record.value)
        if problem is None:
            assert isinstance(record.value, Mapping)
            try:
                return recogniser.recognise(record.value, record.spoiled)
            except ColumnsError as error:
                raise GraftError(f"{record.where}: {error}") from None
            except GraftError as error:
                problem = str(error)
        problems.add(f"{record.where}: {problem}", record.where, record.value)
        return None

    def _checked(self, record: Record, recogniser: Recogniser, problems: RowProblems) -> Row | None:
        """Return a record as a row; None, and what is wrong with it, for one that is bad."""
        found = self._recognised(record, recogniser, problems)
        if found is None:
            return None
        kind, fields = found
        if fields is LEFT_OUT:
            self._left_out += 1
            return None
        if not self.kind:
            self.kind = kind
        self._first = self._first or record.where
        shape = SHAPES[self.kind]
        if kind != self.kind:
            talk = as_conversation(kind, fields) if shape.is_conversation else None
            if talk is None:
                problem = (
                    f"{record.where}: {_a(kind)} row, but {self._first} is {_a(self.kind)} row; "
                    "a file holds one kind of rows, so split it"
                )
                problems.add(problem, record.where, record.value)
                return None
            fields = talk
        row = Row(record.where, shape.fields(fields))
        wrong = shape.problems(row.fields)
        for one in wrong:
            told = f"{row.where}: {recogniser.in_columns(one)}"
            problems.add(told, record.where, record.value)
        return None if wrong else row


class RowProblems:
    """Problems of rows: the first twenty of them, and how many there are."""

    def __init__(self, heading: str, skipped: Skipped | None = None) -> None:
        """Begin with none; with `skipped` given a bad row is no problem, but skipped."""
        self._heading = heading
        self._skipped = skipped
        self._first: list[str] = []
        self._count = 0

    def __bool__(self) -> bool:
        return self._count > 0

    def add(self, problem: str, where: str = "", row: object = None) -> None:
        """Take a problem, which begins with its row's file and line; raise all when there are many.

        where, row: the place alone, and what is there, for the file of skipped rows. Rows that
        are wrong one and all are not read to the end of a large file.
        """
        if self._skipped is not None:
            self._skipped.take(problem, where, row)
            return
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


def _a(kind: str) -> str:
    return f"{SHAPES[kind].article} {kind}"
