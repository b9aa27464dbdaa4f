"""`graft adapter merge`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from graft.cli.command import Command
from graft.cli.fields import Positionals
from graft.cli.show import show


@dataclass(frozen=True, kw_only=True)
class CombineArguments:
    """The adapters, and how they become one."""

    adapters: Positionals = ()
    """Runs or folders of adapters, two or more, all of one base."""
    out: str
    """Folder of the adapter to write."""
    weights: tuple[float, ...] = ()
    """One number for each adapter; default: equal ones with the sum 1, and 1 for ties, which
    takes a mean itself."""
    how: Literal["linear", "svd", "ties", "dare", "dare_ties"] = "linear"
    """linear adds the weighted updates exactly, in the sum of their ranks; svd cuts that to --rank.
    ties keeps the largest elements of each update and takes the mean of those that agree in sign
    (arXiv 2306.01708); dare drops elements at random and rescales (2311.03099); dare_ties does
    both. These three are cut to --rank, too."""
    rank: int | None = None
    """Rank of every layer; default: the largest among the adapters."""
    energy: float | None = None
    """In the place of --rank: each layer's smallest rank that holds this share of the squared
    singular values."""
    density: float | None = None
    """Share of the elements of each update that ties and dare keep."""
    seed: int = 0
    """Seed of dare's dropping."""
    factors: bool = False
    """Combine the A's and the B's themselves, as PEFT's linear, ties and dare_linear do: nothing is
    cut, but products of one adapter's A with another's B come in."""


def merge(arguments: CombineArguments) -> None:
    """Combine adapters of one base into one adapter."""
    from graft.api.adapter.files import ADAPTER_REPORT, in_words
    from graft.api.adapter.merge import combine_adapters
    from graft.cli.progress import progress

    with progress() as events:
        report = combine_adapters(
            arguments.adapters,
            arguments.out,
            weights=arguments.weights,
            how=arguments.how,
            rank=arguments.rank,
            energy=arguments.energy,
            density=arguments.density,
            seed=arguments.seed,
            factors=arguments.factors,
            events=events,
        )
    ranks = sorted({*report.ranks.values()})
    words = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    lost = f"; cutting left out {in_words(report.relative_error)}" if report.relative_error else ""
    show(
        f"{len(report.adapters)} adapters by {report.how}: {len(report.ranks)} layers, {words}, "
        f"{report.parameters:,} parameters{lost}"
    )
    show(f"{arguments.out}, with {ADAPTER_REPORT}")


COMMAND = Command(arguments=CombineArguments, run=merge, loads_models=True)
