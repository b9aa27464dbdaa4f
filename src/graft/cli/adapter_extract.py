"""`graft adapter extract`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from graft.cli.command import Command
from graft.cli.fields import Positional
from graft.cli.show import show
from graft.model.config import TrustConfig


@dataclass(frozen=True, kw_only=True)
class ExtractArguments(TrustConfig):
    """Two models, and how much of their difference is kept."""

    base: Positional
    """The model that the adapter is for: a folder, a hub id or a run."""
    tuned: Positional
    """The model that it is to become: a folder, a hub id or a run, whatever its method."""
    out: str
    """Folder of the adapter to write."""
    rank: int | None = None
    """Rank of every layer."""
    energy: float | None = None
    """In the place of --rank: each layer's smallest rank that holds this share of the squared
    singular values of its difference; 1 keeps all."""
    rest: Literal["keep", "drop"] = "keep"
    """What differs and is in no linear layer (norms, embeddings, the head): keep it whole in the
    adapter, as PEFT's modules_to_save, or leave it out."""


def extract(arguments: ExtractArguments) -> None:
    """Make an adapter of a tuned model: the low-rank difference from its base, by SVD."""
    from graft.api.adapter.extract import CURVE_PICTURE, extract_adapter
    from graft.api.adapter.files import ADAPTER_REPORT, in_words
    from graft.cli.progress import progress

    with progress() as events:
        report = extract_adapter(
            arguments.base,
            arguments.tuned,
            arguments.out,
            rank=arguments.rank,
            energy=arguments.energy,
            rest=arguments.rest,
            trust_remote_code=arguments.trust_remote_code,
            events=events,
        )
    ranks = sorted({layer.rank for layer in report.layers.values()})
    show(
        f"{len(report.layers)} layers, {_ranks(ranks)}, {report.parameters:,} parameters: "
        f"{in_words(report.relative_error)} of the difference is left out"
    )
    if report.rest:
        what = "kept whole" if report.rest_kept else "left out"
        show(
            f"{len(report.rest)} tensors differ that are in no linear layer, "
            f"{in_words(sum(report.rest.values()))} of the squared difference; {what}:"
        )
        for name, share in sorted(report.rest.items(), key=lambda one: -one[1])[:20]:
            show(f"  {name}: {in_words(share)}")
        if len(report.rest) > 20:
            show(f"  and {len(report.rest) - 20} more, in {ADAPTER_REPORT}")
    if report.rest_kept:
        show(
            f"graft takes them into a base of its own: graft adopt {arguments.out} --model "
            f"{arguments.base} --out RUN; PEFT loads them as they are"
        )
    show(f"{arguments.out}, with {ADAPTER_REPORT} and {Path(CURVE_PICTURE).name}")


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"


COMMAND = Command(arguments=ExtractArguments, run=extract, loads_models=True)
