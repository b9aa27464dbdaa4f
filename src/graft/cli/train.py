"""`graft train`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from graft.api.config import TrainConfig
from graft.cli.command import Command, is_asked
from graft.cli.show import show
from graft.cli.signals import Ended, stopping
from graft.errors import GraftError
from graft.train.stop import StoppedError


@dataclass(frozen=True, kw_only=True)
class TrainArguments(TrainConfig):
    """A training run, or what it would be."""

    GROUP: ClassVar[str] = "output"

    dry_run: bool = False
    """Show settings, memory and a row, and begin nothing. Everything is checked as for a run, and
    what is printed is YAML that begins it; the rest of it is a comment."""


def train(arguments: TrainArguments) -> None:
    """Fine-tune a model on a file of examples."""
    config = TrainConfig(**{one.name: getattr(arguments, one.name) for one in fields(TrainConfig)})
    if arguments.dry_run:
        _show_dry_run(config)
    else:
        _train(config)


def _show_dry_run(config: TrainConfig) -> None:
    """Print YAML that `graft train` takes; all else in it is a comment."""
    import yaml

    from graft.api.dry_run import dry_run
    from graft.cli.data import LEGEND, heading, marked
    from graft.cli.progress import progress

    with progress() as events:
        found = dry_run(config, events)
    show("# nothing was trained or written; graft train FILE.yaml runs this")
    show(yaml.safe_dump(found.settings, sort_keys=False).rstrip())
    table = found.plan.table()
    widths = [max(len(row[column]) for row in table) for column in (0, 1)]
    lines = ["", "planned memory"]
    lines += [f"  {what:<{widths[0]}}  {size:>{widths[1]}}  {note}" for what, size, note in table]
    for row in found.rows:
        lines += ["", f"first training row: {heading(row)}", LEGEND]
        lines += marked(row.pieces).split("\n")
    for line in lines:
        show(f"# {line}".rstrip())


def _train(config: TrainConfig) -> None:
    from graft.api.export import next_export
    from graft.api.finetune import finetune
    from graft.api.run.folder import is_run
    from graft.api.run.layout import ADAPTER
    from graft.api.run.report import drift_words, held_out_words, margin_words
    from graft.api.run.status import resume_command
    from graft.cli.progress import progress

    out = Path(config.out)
    try:
        with stopping() as stop, progress() as events:
            report = finetune(config, events, stop)
    except Ended as ended:
        if isinstance(ended.__cause__, StoppedError) or not is_run(out):
            raise
        ended.args = (f"{ended}; go on with: {resume_command(out, config.trust_remote_code)}",)
        raise
    perplexity = "" if report.perplexity is None else f", perplexity {report.perplexity:.4f}"
    margin = "" if (found := margin_words(report)) is None else f", reward margin {found}"
    show(
        f"held-out loss {held_out_words(report)}{perplexity}{margin}, {report.steps_done} steps in "
        f"{report.seconds:.0f} s\n"
        f"end: {report.ended}; kept: {report.kept}\n"
        f"drift from the base on general text: {drift_words(report)}\n"
        f"peak memory {report.peak_memory_bytes / 2**20:,.0f} MiB (planned "
        f"{report.planned_memory_bytes / 2**20:,.0f} MiB)\n"
        f"report: {out / 'report.md'}, plot: {out / 'plots' / 'loss.png'}"
    )
    for line in report.next_steps:
        show(f"next: {line}")
    if not report.worse and (out / ADAPTER).is_dir():  # it is nothing to export, or no adapter
        show(f"next: {next_export(out)}")


def _settings_of_resumed_run(
    texts: Mapping[str, Sequence[str]], settings: Mapping[str, Any]
) -> dict[str, object]:
    """Return the stored settings of the run that --resume goes on with, so that --out is enough.

    Raises GraftError when there is none and the words do not say what is needed to begin it.
    """
    out = texts["out"][-1] if texts.get("out") else settings.get("out")
    if not is_asked("resume", texts, settings):
        return {}
    if not isinstance(out, str):
        raise GraftError("--resume: give --out, the folder of the run to go on with")
    from graft.api.run.resume import read_stored

    stored = read_stored(Path(out))
    if stored is not None:
        names = (field.name for field in fields(TrainConfig))
        return {name: getattr(stored, name) for name in names if name not in _OF_EACH_CALL}
    missing = [f"--{name}" for name in ("model", "data") if name not in {**texts, **settings}]
    if missing:
        raise GraftError(
            f"--resume: {out} is no run folder (it has no config.yaml that can be read), so the "
            f"run can only be begun: give {' and '.join(missing)}, and its other settings, too"
        )
    return {}


_OF_EACH_CALL = ("out", "resume", "epochs", "trust_remote_code")
"""Settings that a resumed run does not take from the part before."""

COMMAND = Command(
    arguments=TrainArguments,
    run=train,
    loads_models=True,
    takes_file=True,
    given=_settings_of_resumed_run,
)
