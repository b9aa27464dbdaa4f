"""Listing and comparing runs by what lies in their folders; imports no torch, so it is quick."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from graft.api.config import TrainConfig, as_plain
from graft.api.run.layout import CONFIG, METRICS, REPORT
from graft.api.run.status import RunStatus, read_status
from graft.api.settings import stored_settings
from graft.errors import GraftError
from graft.files.lock import is_owned
from graft.files.read import read_json
from graft.train.metrics import read_metrics

DEPTH = 2
"""How far below a folder runs are looked for."""
SortKey = Literal["name", "changed", "status", "method", "steps", "loss", "seconds", "memory"]
_NOT_COMPARED = ("out", "resume")


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """A run in one row; a figure that its folder does not have is None."""

    name: str
    """Its folder, as it was found."""
    status: str
    """finished, running, killed, interrupted, failed, adopted, unfinished (of a version that wrote
    no status), or damaged."""
    problem: str | None = None
    """What is damaged, or why it failed."""
    method: str | None = None
    model: str | None = None
    data: str | None = None
    steps_done: int | None = None
    steps: int | None = None
    loss_before: float | None = None
    """Held-out loss before the first step, in nats per target."""
    loss: float | None = None
    """Of what is kept; while there is no result, of the last evaluation after the first."""
    best_loss: float | None = None
    best_step: int | None = None
    seconds: float | None = None
    """Of the whole run, or of its steps so far."""
    memory_bytes: int | None = None
    """The most so far."""
    drift: float | None = None
    """KL from the base on general text, in nats per token."""
    changed: str | None = None
    """When a step or the report was written last, in UTC."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Its configuration."""


def list_runs(folders: Sequence[str | Path], sort: SortKey = "name") -> list[RunSummary]:
    """Return the runs that folders are, or hold one or two levels below, in order.

    A run whose files are damaged is a row that says so. Raises GraftError when a folder is not
    there.
    """
    missing = [str(folder) for folder in folders if not Path(folder).is_dir()]
    if missing:
        raise GraftError(f"there is no folder {', '.join(missing)}; give folders that hold runs")
    found = dict.fromkeys(run for folder in folders for run in _runs_below(Path(folder), DEPTH))
    return sorted((_summary(run) for run in found), key=_order(sort))


def differing_settings(runs: Sequence[RunSummary]) -> dict[str, list[Any]]:
    """Return the settings that are not the same in all runs, with each one's value."""
    known = [run.settings for run in runs]
    names = dict.fromkeys(name for settings in known for name in settings)
    values = {name: [settings.get(name) for settings in known] for name in names}
    return {
        name: each
        for name, each in values.items()
        if name not in _NOT_COMPARED and any(value != each[0] for value in each)
    }


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / CONFIG).is_file():
        yield folder
        return
    if not depth:
        return
    try:
        inside = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:  # another user's
        return
    for path in inside:
        if not path.name.startswith("."):
            yield from _runs_below(path, depth - 1)


def _summary(run: Path) -> RunSummary:
    try:
        return _read(run)
    except (GraftError, OSError) as error:
        return RunSummary(name=str(run), status="damaged", problem=str(error))


def _read(run: Path) -> RunSummary:
    settings = stored_settings(run / CONFIG, TrainConfig)
    try:
        plain = as_plain(TrainConfig(**settings))
    except TypeError as error:
        raise GraftError(f"{run / CONFIG}: {error}") from error
    history = _history(run / METRICS)
    report = read_json(run / REPORT) if (run / REPORT).is_file() else None
    steps = [entry for entry in history if "loss" in entry]
    evaluations = [entry for entry in history if "eval_loss" in entry]
    best = min(evaluations, key=lambda entry: entry["eval_loss"], default=None)
    measured = report or {}
    status = read_status(run)
    last = evaluations[-1]["eval_loss"] if len(evaluations) > 1 else None
    spent = math.fsum(entry.get("step_seconds", 0.0) for entry in steps)
    memory = max((entry.get("memory_bytes", 0.0) for entry in steps), default=0.0)
    return RunSummary(
        name=str(run),
        status=_state(run, status, report is not None) if plain["data"] else "adopted",
        problem=None if status is None else status.error,
        method=plain["method"],
        model=_last_part(plain["model"]),
        data=_last_part(plain["data"]) or None,
        steps_done=int(steps[-1]["step"]) if steps else None,
        steps=plain["steps"],
        loss_before=evaluations[0]["eval_loss"] if evaluations else None,
        loss=_number(measured, "eval_loss") or last,
        best_loss=None if best is None else best["eval_loss"],
        best_step=None if best is None else int(best["step"]),
        seconds=_number(measured, "seconds") or (status.seconds if status else spent) or None,
        memory_bytes=int(_number(measured, "peak_memory_bytes") or memory) or None,
        drift=_number(drift, "kl") if isinstance(drift := measured.get("drift"), dict) else None,
        changed=_changed(run),
        settings=plain,
    )


def _state(run: Path, status: RunStatus | None, reported: bool) -> str:
    """Return how a run stands; one that says it runs and has no owner was killed."""
    if status is None:
        return "finished" if reported else "unfinished"
    if status.state == "running":
        return "running" if is_owned(run) else "killed"
    return status.state


def _history(path: Path) -> list[dict[str, float]]:
    """Return the finite numbers of each entry of a metrics file."""
    return [
        {name: entry[name] for name in entry if _number(entry, name) is not None}
        for entry in read_metrics(path)
    ]


def _number(values: Mapping[str, Any], name: str) -> float | None:
    """Return a finite number of a mapping from a file, or None for anything else."""
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e18:
        return None
    return value if math.isfinite(value) else None


def _last_part(path: str) -> str:
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2]


def _changed(run: Path) -> str:
    paths = [run / name for name in (CONFIG, METRICS, REPORT)]
    latest = max(path.stat().st_mtime for path in paths if path.is_file())
    return datetime.fromtimestamp(latest, UTC).isoformat(timespec="seconds")


def _order(sort: SortKey) -> Callable[[RunSummary], tuple[Any, ...]]:
    """Return what to sort by: what has no such figure comes last, equal ones go by name."""
    keys: dict[str, Callable[[RunSummary], Any]] = {
        "name": lambda run: run.name,
        "changed": lambda run: run.changed,
        "status": lambda run: run.status,
        "method": lambda run: run.method,
        "steps": lambda run: run.steps_done,
        "loss": lambda run: run.best_loss,
        "seconds": lambda run: run.seconds,
        "memory": lambda run: run.memory_bytes,
    }
    key = keys[sort]
    return lambda run: (key(run) is None, key(run) if key(run) is not None else 0, run.name)
