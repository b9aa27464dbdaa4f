"""`graft runs`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.api.runs import SortKey
from graft.cli.command import Command
from graft.cli.fields import Positionals
from graft.cli.show import show, show_json
from graft.text import printable

if TYPE_CHECKING:
    from graft.api.runs import RunSummary

_IMPORTANT = ("status", "held-out loss", "steps", "method", "time", "best", "model", "drift", "MiB")
_WORDS = ("status", "method", "model", "data")
_MIB = 2**20
_LONGEST = 40


@dataclass(frozen=True, kw_only=True)
class RunsArguments:
    """Which runs to show."""

    folder: Positionals = ()
    """Runs, or folders that hold runs one or two levels below; default: where you are. Two runs or
    more that are named themselves are compared."""
    sort: SortKey = "name"
    """What the rows are sorted by."""
    json: bool = False
    """Print one JSON object instead of a table."""


def runs(arguments: RunsArguments) -> None:
    """List the runs below a folder, or show side by side in what some runs differ."""
    from graft.api.run.layout import CONFIG
    from graft.api.runs import differing_settings, list_runs

    named = arguments.folder
    compared = len(named) > 1 and all((Path(one) / CONFIG).is_file() for one in named)
    found = list_runs(named or ["."], arguments.sort)
    differences = differing_settings(found) if compared else {}
    if arguments.json:
        rows = [asdict(run) for run in found]
        values = {"runs": rows, "differing_settings": differences} if compared else {"runs": rows}
        show_json(values)
        return
    if not found:
        show("no runs here or two levels below; graft train --out FOLDER makes one")
        return
    if compared:
        _compare(found, differences)
    else:
        _list(found)
    for run in found:
        if run.problem is not None:
            show(f"{run.name}: {run.problem}")


def _list(found: Sequence[RunSummary]) -> None:
    from graft.cli.tables import Column, print_table

    columns = [
        Column(title, [_short(figure(run)) for run in found], title not in _WORDS)
        for title, figure in _FIGURES.items()
    ]
    print_table("runs", Column("run", [_short(run.name) for run in found]), columns, _IMPORTANT)


def _compare(found: Sequence[RunSummary], differences: dict[str, list[Any]]) -> None:
    """Print a column for each run: first the settings that differ, then what came of them."""
    from graft.cli.tables import Column, print_table

    settings = [[_short(_value(value)) for value in each] for each in differences.values()]
    figures = [[_short(figure(run)) for run in found] for figure in _FIGURES.values()]
    labels = [*(name.replace("_", "-") for name in differences), *_FIGURES]
    columns = [
        Column(_short(run.name), [row[index] for row in (*settings, *figures)])
        for index, run in enumerate(found)
    ]
    print_table("settings that differ, and figures", Column("", labels), columns)


def _steps(run: RunSummary) -> str:
    if run.steps_done is None:
        return "-"
    return f"{run.steps_done:,}" if run.steps is None else f"{run.steps_done:,} of {run.steps:,}"


def _losses(run: RunSummary) -> str:
    if run.loss_before is None:
        return "-"
    return (
        f"{run.loss_before:.4f}" if run.loss is None else f"{run.loss_before:.4f} → {run.loss:.4f}"
    )


def _best(run: RunSummary) -> str:
    return "-" if run.best_loss is None else f"{run.best_loss:.4f} at {run.best_step:,}"


def _time(run: RunSummary) -> str:
    if run.seconds is None:
        return "-"
    minutes, seconds = divmod(round(run.seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def _memory(run: RunSummary) -> str:
    return "-" if run.memory_bytes is None else f"{run.memory_bytes / _MIB:,.0f}"


_FIGURES: dict[str, Callable[[RunSummary], str]] = {
    "status": lambda run: run.status,
    "method": lambda run: run.method or "-",
    "model": lambda run: run.model or "-",
    "data": lambda run: run.data or "-",
    "steps": _steps,
    "held-out loss": _losses,
    "best": _best,
    "time": _time,
    "MiB": _memory,
    "drift": lambda run: "-" if run.drift is None else f"{run.drift:.4f}",
}
"""The columns, by title."""


def _value(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)


def _short(text: str) -> str:
    """Return a text that may come from a file, fit for a cell."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= _LONGEST else "…" + text[1 - _LONGEST :]


COMMAND = Command(arguments=RunsArguments, run=runs)
