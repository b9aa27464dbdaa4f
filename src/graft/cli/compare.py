"""`graft compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.cli.command import Command, is_asked
from graft.cli.show import show
from graft.cli.signals import stopping
from graft.comparison.config import CompareConfig
from graft.errors import GraftError

if TYPE_CHECKING:
    from graft.comparison.results import Column as FigureColumn
    from graft.comparison.results import Result, Row

DEMO_STEPS = 160
_FIRST = "deployed model"
_IMPORTANT = ("perplexity", "attributes", "MiB", "BLEU", "training s", "peak MiB", "ROUGE-L")


@dataclass(frozen=True, kw_only=True)
class CompareArguments(CompareConfig):
    """A comparison, or that of the bundled model."""

    demo: bool = False
    """Compare on the bundled model and data; --model and --data are then not needed."""


def demo_settings(
    texts: Mapping[str, Sequence[str]], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the settings that --demo stands for, below those that are given."""
    if not is_asked("demo", texts, settings):
        return {}
    from graft.demo.run import BASE, HELD_OUT, TRAINING

    files = {"model": str(BASE), "data": str(TRAINING), "eval_data": str(HELD_OUT)}
    # One precision for all, so that exact merges give equal figures; given --epochs stand alone.
    steps = {} if "epochs" in texts or "epochs" in settings else {"steps": DEMO_STEPS}
    return {**files, "dtype": "float32", "max_new_tokens": 96, **steps}


def compare(arguments: CompareArguments) -> None:
    """Train contenders, deploy each, and score the deployed files side by side.

    Raises GraftError when a contender failed.
    """
    from graft.cli.progress import progress
    from graft.comparison.results import COSTS, SCORES, with_figures
    from graft.comparison.run import compare as run

    with stopping() as stop, progress() as events:
        result = run(arguments, events, stop)
    title = f"{Path(arguments.model).name} on {Path(arguments.data).name}, held-out rows"
    _show(title, result.rows, with_figures((*SCORES, *COSTS), result.rows))
    show(f"{result.page}, {result.data}; {result.seconds:.0f} s")
    if result.failed:
        raise GraftError(_failures(result.failed, len(result.results)))


def _show(title: str, rows: Sequence[Row], columns: Sequence[FigureColumn]) -> None:
    from graft.cli.tables import Column, print_table

    shown = [Column(column.title, [column.text(row) for row in rows]) for column in columns]
    print_table(title, Column(_FIRST, [row.label for row in rows]), shown, _IMPORTANT)


def _failures(failed: Sequence[Result], total: int) -> str:
    lines = "\n".join(f"  - {one.label}: {one.error}" for one in failed)
    return (
        f"{len(failed)} of {total} deployed models failed; the same command tries them again\n"
        f"{lines}"
    )


COMMAND = Command(arguments=CompareArguments, run=compare, takes_file=True, given=demo_settings)
