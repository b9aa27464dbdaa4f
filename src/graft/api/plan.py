"""Predicting the memory of a run."""

from __future__ import annotations

from graft.api.config import PlanConfig, format_description
from graft.formats.registry import parse_format
from graft.model.load import find_folder
from graft.plan.memory import MemoryPlan, plan_memory


def plan(config: PlanConfig) -> MemoryPlan:
    """Return the predicted memory of a run, from config.json alone; no weights are read."""
    description = format_description(config, config.method)
    return plan_memory(
        str(find_folder(config.model)),
        weight_format=None if description is None else parse_format(description),
        adapter=config.resolved(None if description is None else description.get("bits")),
        dtype=config.dtype,
        device=config.device,
        batch_size=config.batch_size,
        sequence_length=config.max_length,
        checkpointing=config.checkpointing,
        trust_remote_code=config.trust_remote_code,
    )
