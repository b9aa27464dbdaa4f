"""The file of a run's metrics; imports no torch, so that runs are listed quickly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from graft.files.read import open_regular

Metrics = dict[str, float]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a metrics file, up to a line that was cut off or is none."""
    entries: list[dict[str, Any]] = []
    if not path.is_file():
        return entries
    with open_regular(path) as file:
        for line in file:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(entry, dict) or not _is_number(*entry.values(), entry.get("step")):
                break
            entries.append(entry)
    return entries


def _is_number(*values: object) -> bool:
    return all(isinstance(value, int | float) for value in values)
