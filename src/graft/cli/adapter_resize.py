"""`graft adapter resize`."""

from __future__ import annotations

from dataclasses import dataclass

from graft.cli.command import Command
from graft.cli.fields import Positional
from graft.cli.show import show


@dataclass(frozen=True, kw_only=True)
class ResizeArguments:
    """The adapter, and how small it becomes."""

    adapter: Positional
    """A run, or the folder of an adapter."""
    out: str
    """Folder of the adapter to write."""
    rank: int | None = None
    """Rank of every layer."""
    energy: float | None = None
    """In the place of --rank: each layer's smallest rank that holds this share of the squared
    singular values of its update."""


def resize(arguments: ResizeArguments) -> None:
    """Cut an adapter to another rank: the nearest update of that rank, by SVD."""
    from graft.api.adapter.files import ADAPTER_REPORT, in_words
    from graft.api.adapter.resize import resize_adapter
    from graft.cli.progress import progress

    with progress() as events:
        report = resize_adapter(
            arguments.adapter,
            arguments.out,
            rank=arguments.rank,
            energy=arguments.energy,
            events=events,
        )
    ranks = sorted({layer.rank for layer in report.layers.values()})
    words = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    show(
        f"{len(report.layers)} layers, {words}: {report.parameters:,} parameters of "
        f"{report.parameters_before:,}, {in_words(report.relative_error)} of the update is left out"
    )
    show(f"{arguments.out}, with {ADAPTER_REPORT}")


COMMAND = Command(arguments=ResizeArguments, run=resize, loads_models=True)
