"""Predicting the memory of a run."""

from __future__ import annotations

from graft.api.config import PlanConfig, calibrating_rows
from graft.api.run.base import base_format
from graft.model.subject import open_subject
from graft.plan.memory import MemoryPlan, plan_memory


def plan(config: PlanConfig) -> MemoryPlan:
    """Return the predicted memory of a run, from config.json alone; no weights are read."""
    subject = open_subject(config.model, config.trust_remote_code, config_alone=True)
    weight_format = base_format(config, subject.folder, subject.config)
    bits = None if weight_format is None else weight_format.options().get("bits")
    return plan_memory(
        subject,
        weight_format=weight_format,
        adapter=config.resolved(bits),
        dtype=config.dtype,
        device=config.device,
        batch_size=config.batch_size,
        sequence_length=config.max_length,
        checkpointing=config.checkpointing,
        calibration_rows=calibrating_rows(config, config.method, config.bits),
    )
