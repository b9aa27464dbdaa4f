"""`--columns KEY=COLUMN`: which column of a file holds which key of a row."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from graft.data.shapes.layouts import RowLayout
from graft.data.sources.record import Layout
from graft.errors import GraftError, did_you_mean, raise_problems
from graft.text import listed, quoted

_MISSING = object()
_ASKED = (
    *("prompt", "question", "query", "problem", "input", "source", "user", "human", "mr"),
    *("article", "document", "dialogue", "docstring"),
)
_ANSWERED = (
    *("completion", "response", "answer", "output", "solution", "target", "ref", "reply"),
    *("summary", "highlight", "translation", "code"),
)
_TEXTS = ("text", "content", "body", "document", "story", "sentence", "code", "raw_content")
_LOOKED_AT = 1000
"""Names among which the nearest is looked for, which takes long for each."""
_DEPTH = 3
"""Levels at which a column is looked for, to name it in a message."""


class Columns:
    """Names columns anew: each KEY=COLUMN, where a.b or a.0 is a part of a column."""

    def __init__(self, words: Iterable[str], known_layouts: Sequence[RowLayout]) -> None:
        """Take the words of --columns; raises GraftError with all that is wrong with them."""
        self._layouts = known_layouts
        self._paths: dict[str, tuple[str, ...]] = {}
        known = dict.fromkeys(key for layout in self._layouts for key in layout.keys)
        problems = []
        for word in words:
            key, mark, path = word.partition("=")
            if not mark or not key or not path:
                problems.append(f"{quoted(word)}: expected KEY=COLUMN, as in prompt=question")
            elif key not in known:
                problems.append(
                    f"{quoted(word)}: no row has a key {quoted(key)}{_near(key, known)}"
                )
            elif key in self._paths:
                problems.append(f"{quoted(word)}: {key} is given twice")
            else:
                self._paths[key] = (path,)
        raise_problems(problems, "--columns")
        self._missing = set(self._paths)
        """Keys whose columns no row has had so far."""

    def __bool__(self) -> bool:
        return bool(self._paths)

    def layouts(self) -> tuple[RowLayout, ...]:
        """Return the layouts that all of the keys belong to; raises GraftError when there is none.

        Thus the columns that are named decide how a row is read, whatever else it holds.
        """
        wanted = set(self._paths)
        found = tuple(layout for layout in self._layouts if wanted.issubset(layout.keys))
        if not found:
            raise GraftError(
                f"--columns: no kind of rows has all of the keys {listed(self._paths)}; give "
                "those of one, such as prompt and completion, or instruction, input and output"
            )
        return found

    def needed(self) -> list[Layout]:
        """Return the columns to read of a file of columns; see `Layout`."""
        if not self:
            return [Layout(one.required, one.keys, one.fits is None) for one in self._layouts]
        return [Layout((), tuple(key for one in self.layouts() for key in self._sources(one.keys)))]

    def _sources(self, keys: Iterable[str]) -> Iterator[str]:
        for key in keys:
            path = self._paths[key][0] if key in self._paths else key
            yield path
            yield path.partition(".")[0]

    def renamed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row under the keys, without the columns that they name."""
        found: dict[str, Any] = {}
        taken: set[str] = set()
        for key, (path,) in self._paths.items():
            value = _at(row, path)
            if value is not _MISSING:
                found[key] = value
                self._missing.discard(key)
            taken.add(path if path in row else path.partition(".")[0])
        rest = {name: row[name] for name in row if name not in taken and name not in self._paths}
        return {**rest, **found}

    def spoiled(self, reasons: Mapping[str, str]) -> dict[str, str]:
        """Return why columns are spoiled, by their keys."""
        found = dict(reasons)
        for key, (path,) in self._paths.items():
            for name in (path, path.partition(".")[0]):
                if name in reasons:
                    found[key] = f"(column {name}) {reasons[name]}"
        return found

    def column_of(self, key: str) -> str:
        """Return the column that a key is read from."""
        return self._paths[key][0] if key in self._paths else key

    def absent(self, row: Mapping[str, Any]) -> str | None:
        """Return which named columns a row lacks, with the columns it has, or None."""
        lost = [
            f"{key}={path}" for key, (path,) in self._paths.items() if _at(row, path) is _MISSING
        ]
        if not lost:
            return None
        path = lost[0].partition("=")[2]
        return f"--columns {lost[0]}: there is no column {quoted(path)}{_near(path, _paths(row))}"

    def check_found(self, where: object) -> None:
        """Raise GraftError for a column that no row of a file had."""
        for key in self._paths:
            if key in self._missing:
                path = self._paths[key][0]
                raise GraftError(f"{where}: --columns {key}={path}: no row has such a column")


def renaming(row: Mapping[str, Any]) -> str:
    """Return the words of --columns for a row that no layout fits, as far as they can be guessed.

    They are what a user would type; names that say nothing stand for the user's own choice.
    """
    paths = [path for path, value in _leaves(row) if isinstance(value, str)]
    if found := _guess(row, paths):
        return f"if these are its parts, pass --columns {_words(found)}"
    names = paths if len(paths) == 2 else ["COLUMN", "COLUMN"]
    shown = _words({"prompt": names[0], "completion": names[1]})
    return f"name the columns, as in --columns {shown}, or --columns text=COLUMN"


def _words(columns: Mapping[str, str]) -> str:
    return " ".join(shlex.quote(f"{key}={path}") for key, path in columns.items())


def _guess(row: Mapping[str, Any], paths: list[str]) -> dict[str, str]:
    inside = [
        (f"{name}.{key}", part)
        for name, value in row.items()
        if isinstance(value, Mapping)
        for key, part in value.items()
    ]
    talk = [name for name, value in (*row.items(), *inside) if _is_talk(value)]
    if talk:
        return {"messages": talk[0]}
    task = _named(paths, ("instruction",))
    answer = _named(paths, _ANSWERED)
    if task and answer:
        given = _named([path for path in paths if path not in (task, answer)], ("input", "context"))
        found = {"instruction": task, "input": given, "output": answer}
        return {key: path for key, path in found.items() if path}
    asked = _named([path for path in paths if path != answer], _ASKED)
    if asked and answer:
        rest = [path for path in paths if path not in (asked, answer)]
        if given := _named(rest, ("context",)):
            return {"instruction": asked, "input": given, "output": answer}
        return {"prompt": asked, "completion": answer}
    text = _named(paths, _TEXTS)
    if text or (len(paths) == 1 and not asked and not answer):
        return {"text": text or paths[0]}
    return {}


def _named(paths: list[str], names: tuple[str, ...]) -> str | None:
    """Return the column that is called, or holds, or lies in one that is called as a word says."""
    parts = {path: [one for one in path.lower().split(".") if not one.isdigit()] for path in paths}
    for fits in (_is_last, _is_in_last, _is_any):
        for name in names:
            for path, found in parts.items():
                if found and fits(name, found):
                    return path
    return None


def _is_last(name: str, parts: list[str]) -> bool:
    return parts[-1].strip() in (name, f"{name}s")


def _is_in_last(name: str, parts: list[str]) -> bool:
    return len(name) > 3 and name in parts[-1]


def _is_any(name: str, parts: list[str]) -> bool:
    return name in parts or f"{name}s" in parts


def _is_talk(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(turn, Mapping) and ("content" in turn or "value" in turn) for turn in value
        )
    )


def _leaves(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the path and the value of all that is in a row, of lists the first item."""
    inside: list[tuple[str, Any]] = list(row.items())
    for _ in range(_DEPTH):
        deeper: list[tuple[str, Any]] = []
        for path, value in inside[:100]:
            if isinstance(value, Mapping):
                deeper += ((f"{path}.{key}", part) for key, part in value.items())
            elif isinstance(value, list) and value:
                deeper.append((f"{path}.0", value[0]))
            else:
                yield path, value
        inside = deeper


def _paths(row: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys([*row, *(path for path, _ in _leaves(row))]))


def _at(row: Mapping[str, Any], path: str) -> Any:
    """Return what stands at a path in a row, or _MISSING; a column of that name comes first."""
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part[:9]) < len(value):
            value = value[int(part)]
        else:
            return _MISSING
    return value


def _near(name: str, known: Iterable[str]) -> str:
    """Return the nearest of some names, and some of all of them."""
    names = list(known)
    near = did_you_mean(name, names[:_LOOKED_AT])
    return (
        f"{near} (there are: {listed(names, 20)})"
        if near.startswith("; did")
        else (f"; there are: {listed(names, 20)}")
    )
