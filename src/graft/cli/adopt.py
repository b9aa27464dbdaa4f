"""`graft adopt`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from graft.api.config import AdoptedFormat
from graft.cli.command import Command
from graft.cli.fields import Positional
from graft.cli.show import show
from graft.model.config import TrustConfig


@dataclass(frozen=True, kw_only=True)
class AdoptArguments(TrustConfig):
    """The adapter, its base, and the run to make."""

    adapter: Positional
    """Folder with adapter_config.json and the weights, of PEFT or mlx-lm; its tokenizer, embeddings
    and head are taken too."""
    out: str
    """Folder of the run, made new."""
    model: str | None = None
    """The base: a model folder, a folder that graft quantised, or a hub id; default: the one that
    the adapter names."""
    format: AdoptedFormat | None = None
    """Round the base's linear layers as bitsandbytes does (for an adapter that was trained so)."""
    double_quant: bool = False
    """Quantise the constants of nf4 and fp4 too, as bnb_4bit_use_double_quant does."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute precision of the run."""


def adopt(arguments: AdoptArguments) -> None:
    """Make a run of an adapter that PEFT or mlx-lm trained; nothing is trained."""
    from graft.api.adopt import adopt as run
    from graft.api.export import next_export
    from graft.cli.progress import progress

    with progress() as events:
        report = run(**asdict(arguments), events=events)
    show(
        f"{arguments.out}: {report.title}, {report.parameters:,} parameters in "
        f"{report.layers} layers, on {report.model}"
    )
    for line in report.lines():
        show(line)
    show(f"next: {next_export(Path(arguments.out))}")


COMMAND = Command(arguments=AdoptArguments, run=adopt, loads_models=True)
