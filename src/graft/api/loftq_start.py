"""The start of adapters that make up for the rounding of their base."""

from __future__ import annotations

import shutil
from pathlib import Path

from graft.adapters.base import lora_scaling
from graft.adapters.starts.loftq import LoftQ, start_adapters
from graft.api.config import TrainConfig
from graft.api.events import Events
from graft.api.run.folder import BASE, START
from graft.model.adapter_files import save_adapter
from graft.model.load import LoadedModel


def chosen_loftq(config: TrainConfig) -> LoftQ | None:
    """Return what rounds the base together with the adapter's start, if the run asks for it."""
    if config.init != "loftq":
        return None
    scaling = lora_scaling(config.update_rank, config.alpha, config.rslora)
    return LoftQ(config.update_rank, scaling, config.loftq_rounds)


def start_from_loftq(loaded: LoadedModel, loftq: LoftQ, run: Path, events: Events) -> None:
    """Start the adapters where LoftQ left them, and keep that start beside the run.

    A resumed run has the adapter in its checkpoint; the start is for a merge into another base.
    """
    start_adapters(loaded.model, loftq.starts)
    if (run / START).is_dir():
        shutil.rmtree(run / START)
    save_adapter(loaded.model, run / START, base=str(run / BASE), init="loftq")
    events.note(
        f"loftq: with the adapter's start the weights' squared error is {loftq.left():.2f} times "
        "that of rounding alone"
    )
