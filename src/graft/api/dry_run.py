"""A run as it would be begun: its settings, its memory and a row, before anything is written."""

from __future__ import annotations

from dataclasses import dataclass

from graft.api.config import TrainConfig
from graft.api.data import ShownRow, shown_sides
from graft.api.events import Events
from graft.api.run.prepare import prepare
from graft.api.run.resume import as_settings
from graft.errors import GraftError
from graft.plan.memory import MemoryPlan


@dataclass(frozen=True)
class DryRun:
    """What a run would begin with."""

    settings: dict[str, object]
    """Every setting, defaults filled in, as the run's config.yaml would have it."""
    plan: MemoryPlan
    rows: list[ShownRow]
    """The first training row: of a pair both sides."""


def dry_run(config: TrainConfig, events: Events | None = None) -> DryRun:
    """Check everything that a run checks before it reads a weight, and return what it would do.

    Nothing is written. Raises GraftError with all problems, as `finetune` does.
    """
    if config.resume:
        raise GraftError("--dry-run says how a run would begin; leave --resume out")
    prepared = prepare(config, events or Events())
    first = prepared.training.examples[0]
    return DryRun(
        settings=as_settings(prepared.config),
        plan=prepared.plan,
        rows=shown_sides(first, prepared.subject.tokenizer),
    )
