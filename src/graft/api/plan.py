"""Predicting the memory of a run."""

from __future__ import annotations

from graft.api.config import (
    PlanConfig,
    calibrating_rows,
    check_solver,
    chosen_solver,
    format_description,
)
from graft.formats.registry import parse_format
from graft.model.load import read_config
from graft.plan.memory import MemoryPlan, plan_memory
from graft.plan.skeleton import config_folder, keeps_float32


def plan(config: PlanConfig) -> MemoryPlan:
    """Return the predicted memory of a run, from config.json alone; no weights are read."""
    model_config = read_config(config_folder(config.model), config.trust_remote_code)
    float32 = keeps_float32(model_config, config.dtype)
    description = format_description(config, config.method, float32)
    check_solver(chosen_solver(config, config.method, config.bits), description)
    return plan_memory(
        config.model,
        weight_format=None if description is None else parse_format(description),
        adapter=config.resolved(None if description is None else description.get("bits")),
        dtype=config.dtype,
        device=config.device,
        batch_size=config.batch_size,
        sequence_length=config.max_length,
        checkpointing=config.checkpointing,
        calibration_rows=calibrating_rows(config, config.method, config.bits),
        trust_remote_code=config.trust_remote_code,
    )
