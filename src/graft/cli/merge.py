"""`graft merge`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from graft.cli.command import Command
from graft.cli.fields import Positional
from graft.cli.show import show
from graft.model.config import TrustConfig


@dataclass(frozen=True, kw_only=True)
class MergeArguments(TrustConfig):
    """The run, and what becomes of it."""

    run: Positional
    """The run's folder."""
    out: str
    """Folder to write."""
    into: Literal["trained", "original"] = "trained"
    """The base that was trained on (dequantised for qlora), or the original one."""
    original: str | None = None
    """The unquantised model that --into original merges into, a folder or hub id, where the run's
    base was quantised before it came; default: the base that the run names."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Stored dtype of weights that become dense; auto is the source's."""


def merge(arguments: MergeArguments) -> None:
    """Fold a run's adapter into a model folder, with merge-report.json in it."""
    from graft.api.merge import merge as run
    from graft.cli.progress import progress

    with progress() as events:
        report = run(
            arguments.run,
            arguments.out,
            into=arguments.into,
            original=arguments.original,
            dtype=arguments.dtype,
            trust_remote_code=arguments.trust_remote_code,
            events=events,
        )
    show(report.summary())
    show(f"{arguments.out}, with merge-report.json")


COMMAND = Command(arguments=MergeArguments, run=merge, loads_models=True)
