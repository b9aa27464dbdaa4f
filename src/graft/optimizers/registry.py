"""The optimizers that a training may have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graft.entries import Entries, Listed

if TYPE_CHECKING:
    from graft.optimizers.base import OptimizerKind

OPTIMIZERS: Entries[OptimizerKind] = Entries(
    "optimizer", {"adamw": Listed("graft.optimizers.adamw:ADAMW", "Adam, the weights decayed")}
)

DEFAULT_OPTIMIZER = "adamw"
