"""`graft train`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from graft.api.config import TrainConfig
from graft.cli.command import Command


def train(config: TrainConfig) -> None:
    """Fine-tune a model on a file of examples."""
    from graft.api.export import next_export
    from graft.api.finetune import finetune
    from graft.api.run.layout import ADAPTER
    from graft.cli.progress import progress

    with progress() as events:
        report = finetune(config, events)
    out = Path(config.out)
    perplexity = "" if report.perplexity is None else f", perplexity {report.perplexity:.4f}"
    print(
        f"held-out loss {report.eval_loss_before:.4f} → {report.eval_loss:.4f}{perplexity}, "
        f"{report.steps} steps in {report.seconds:.0f} s\n"
        f"peak memory {report.peak_memory_bytes / 2**20:,.0f} MiB (planned "
        f"{report.planned_memory_bytes / 2**20:,.0f} MiB)\n"
        f"report: {out / 'report.md'}, plot: {out / 'plots' / 'loss.png'}"
    )
    if (out / ADAPTER).is_dir():  # not where the weights themselves were trained
        print(f"next: {next_export(out)}")


def _settings_of_resumed_run(words: Sequence[str]) -> dict[str, object]:
    """Return the stored settings of the run that --resume goes on with, so that --out is enough."""
    words = [part for word in words for part in word.split("=", 1)]
    if "--resume" not in words or "--out" not in words[:-1]:
        return {}
    from graft.api.settings import stored_settings

    stored = Path(words[words.index("--out") + 1]) / "config.yaml"
    return stored_settings(stored, TrainConfig) if stored.is_file() else {}


COMMAND = Command(arguments=TrainConfig, run=train, takes_file=True, given=_settings_of_resumed_run)
