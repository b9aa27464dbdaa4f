"""`graft export`."""

from __future__ import annotations

from dataclasses import dataclass

from graft.cli.command import Command
from graft.cli.fields import Positional
from graft.cli.show import show
from graft.export.config import ExportTarget
from graft.model.config import TrustConfig


@dataclass(frozen=True, kw_only=True)
class ExportArguments(TrustConfig):
    """What to write, and for which program."""

    model: Positional
    """A run or a model folder."""
    to: ExportTarget
    """What to write, by the program that reads it."""
    out: str
    """File (gguf) or folder to write."""
    requantize: bool = False
    """Round a lora or qlora run to INT4 (all but hf); the loss that this costs is printed."""
    license: str | None = None
    """Licence on the model card, as the hub names it; default: that on the base's card."""


def export(arguments: ExportArguments) -> None:
    """Write a run or a model for another program."""
    from graft.api.export import export_model
    from graft.cli.progress import progress

    with progress() as events:
        report = export_model(
            arguments.model,
            arguments.to,
            arguments.out,
            requantize=arguments.requantize,
            license=arguments.license,
            trust_remote_code=arguments.trust_remote_code,
            events=events,
        )
    for note in report.notes:
        show(f"note: {note}")
    show(f"{report.path}: {report.bytes / 2**20:,.1f} MiB")


COMMAND = Command(arguments=ExportArguments, run=export, loads_models=True)
