"""`graft train`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graft.api.config import TrainConfig
from graft.cli.command import Command, is_asked
from graft.cli.show import show
from graft.cli.signals import Ended, stopping
from graft.errors import GraftError
from graft.train.stop import StoppedError


def train(config: TrainConfig) -> None:
    """Fine-tune a model on a file of examples."""
    from graft.api.export import next_export
    from graft.api.finetune import finetune
    from graft.api.run.folder import is_run
    from graft.api.run.layout import ADAPTER
    from graft.api.run.report import drift_words, held_out_words
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
    show(
        f"held-out loss {held_out_words(report)}{perplexity}, {report.steps_done} steps in "
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
    if not is_asked("resume", texts, settings) or not isinstance(out, str):
        return {}
    from graft.api.run.resume import read_stored

    stored = read_stored(Path(out))
    if stored is not None:
        fields = (field.name for field in dataclasses.fields(TrainConfig))
        return {name: getattr(stored, name) for name in fields if name not in _OF_EACH_CALL}
    missing = [f"--{name}" for name in ("model", "data") if name not in {**texts, **settings}]
    if missing:
        raise GraftError(
            f"--resume: {out} is no run folder (it has no config.yaml that can be read), so the "
            f"run can only be begun: give {' and '.join(missing)}, and its other settings, too"
        )
    return {}


_OF_EACH_CALL = ("out", "resume", "epochs", "trust_remote_code")
"""Settings that a resumed run does not take from the part before."""

COMMAND = Command(arguments=TrainConfig, run=train, takes_file=True, given=_settings_of_resumed_run)
