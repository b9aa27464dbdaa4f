"""A mixture: a YAML list of sources, each with a weight, columns and a format of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.data.sources.hub import HUB
from graft.errors import GraftError, did_you_mean, raise_problems
from graft.files.read import YAML_BYTES, parse_yaml, read_text
from graft.text import quoted

MIXTURES = (".yaml", ".yml")
"""Suffixes of files that are mixtures."""
_KEYS = ("data", "weight", "columns", "data_format")
_MOST_WEIGHT = 1000


@dataclass(frozen=True)
class Part:
    """One source of a mixture."""

    data: str
    weight: float = 1.0
    columns: tuple[str, ...] = ()
    data_format: str | None = None


def read_mixture(path: Path) -> list[Part]:
    """Return the sources of a mixture; raises GraftError with all that is wrong with it."""
    value = parse_yaml(read_text(path, YAML_BYTES), path)
    if not isinstance(value, list) or not value:
        raise GraftError(
            f"{path}: expected a list of sources, each as in '- data: rows.jsonl', perhaps with "
            "weight, columns and data_format"
        )
    problems: list[str] = []
    parts = [_part(item, f"source {number}", problems) for number, item in enumerate(value, 1)]
    raise_problems(problems, str(path))
    return [Part(_beside(path, one.data), *_rest(one)) for one in parts]


def _rest(part: Part) -> tuple[float, tuple[str, ...], str | None]:
    return part.weight, part.columns, part.data_format


def _beside(path: Path, name: str) -> str:
    """Return the name of a source; that of a file is looked for in the mixture's folder."""
    return name if name.startswith(HUB) else str(path.parent / name)


def _part(item: Any, where: str, problems: list[str]) -> Part:
    item = {"data": item} if isinstance(item, str) else item
    if not isinstance(item, Mapping):
        problems.append(f"{where} is {quoted(item)}; expected keys {', '.join(_KEYS)}")
        return Part("")
    for key in item:
        if key not in _KEYS:
            near = did_you_mean(str(key), _KEYS)
            problems.append(f"{where}: unknown key {quoted(key)}{near}")
    data, weight = item.get("data"), item.get("weight", 1)
    if not isinstance(data, str) or not data:
        problems.append(f"{where}: data is {quoted(data)}; expected the name of a file")
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not math.isfinite(weight) or not 0 < weight <= _MOST_WEIGHT:
        problems.append(
            f"{where}: weight is {quoted(weight)}; expected a number above 0, at most "
            f"{_MOST_WEIGHT}: how often each row is trained in an epoch"
        )
    columns = item.get("columns") or {}
    if isinstance(columns, Mapping):
        columns = [f"{key}={column}" for key, column in columns.items()]
    if not isinstance(columns, list) or any(not isinstance(one, str) for one in columns):
        problems.append(f"{where}: columns is {quoted(columns)}; expected lines of 'key: column'")
        columns = []
    data_format = item.get("data_format")
    if data_format is not None and not isinstance(data_format, str):
        problems.append(f"{where}: data_format is {quoted(data_format)}; expected a name")
    if problems:
        return Part("")
    return Part(str(data), float(weight), tuple(columns), data_format)
