"""Predicting the memory of a run."""

from __future__ import annotations

from graft.adapters.registry import method_of
from graft.api.checks import calibrating_rows, check_plan_config, looking_rows
from graft.api.config import PlanConfig
from graft.api.run.formats import base_format
from graft.api.run.teacher import teacher_format
from graft.model.subject import Subject, open_subject
from graft.objectives.registry import OBJECTIVES
from graft.plan.memory import MemoryPlan, plan_memory


def plan(config: PlanConfig) -> MemoryPlan:
    """Return the predicted memory of a run, from config.json alone; no weights are read."""
    check_plan_config(config)
    subject = _opened(config.model, config)
    weight_format = base_format(config, subject)
    adapter = config.resolved(None if weight_format is None else weight_format.bits)
    return plan_memory(
        subject,
        weight_format=weight_format,
        adapter=adapter,
        dtype=method_of(config).compute_dtype(config.dtype),
        device=config.device,
        batch_size=config.batch_size * OBJECTIVES[config.objective].sequences,
        sequence_length=config.max_length,
        checkpointing=config.checkpointing,
        optimizer=config.optimizer,
        calibration_rows=calibrating_rows(adapter),
        looking_rows=looking_rows(adapter),
        teacher=None if config.teacher is None else _opened(config.teacher, config),
        teacher_format=teacher_format(config),
    )


def _opened(model: str, config: PlanConfig) -> Subject:
    return open_subject(model, config.trust_remote_code, config_alone=True)
