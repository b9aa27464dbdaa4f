"""The file of a run's metrics; imports no torch, so that runs are listed quickly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from graft.files.read import open_regular

Metrics = dict[str, float]

_LINE_BYTES = 2**16


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a metrics file, up to a line that was cut off or is none."""
    entries: list[dict[str, Any]] = []
    if not path.is_file():
        return entries
    with open_regular(path) as file:
        while line := file.readline(_LINE_BYTES):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not _is_entry(entry):
                break
            entries.append(entry)
    return entries


def _is_figure(value: object) -> bool:
    """Return whether a value is a number that a float holds; that of a loss may be NaN."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _is_entry(entry: object) -> bool:
    """Return whether a value is the figures of a step or an evaluation, none of them missing."""
    return (
        isinstance(entry, dict)
        and type(entry.get("step")) is int
        and all(_is_figure(value) for value in entry.values())
        and ("loss" not in entry or "learning_rate" in entry)
        and ("step_seconds" not in entry or "tokens_per_second" in entry)
    )
