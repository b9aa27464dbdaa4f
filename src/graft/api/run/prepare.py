"""Everything that can be known of a run before a weight is read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from graft.adapters.method import Method
from graft.adapters.registry import method_of
from graft.api.checks import calibrating_rows, check_train_config, chosen_solver
from graft.api.config import TrainConfig
from graft.api.events import Events
from graft.api.export import check_bias_exports, check_exports
from graft.api.run.folder import is_run, read_run_config
from graft.api.run.formats import base_format, exported_formats
from graft.api.run.layout import CONFIG
from graft.data.encode import EncodedData
from graft.data.load import load_train_and_eval
from graft.errors import GraftError, Problems, raise_problems
from graft.formats.base import WeightFormat
from graft.formats.registry import settings_of
from graft.model.running.checkpointing import check_checkpointing
from graft.model.subject import Subject, open_subject
from graft.model.targets import select_targets
from graft.objectives.registry import OBJECTIVES
from graft.plan.memory import MemoryPlan, plan_memory
from graft.train.loop import steps_to_train
from graft.train.schedule import default_learning_rate

RESUME_MAY_CHANGE = {
    *("resume", "trust_remote_code", "device", "checkpointing"),
    *("eval_every", "save_every", "export"),
}


@dataclass(frozen=True)
class Prepared:
    """A run before any weight is read."""

    config: TrainConfig
    """Resolved: every default is filled in, as the run's config.yaml has it."""
    method: Method
    subject: Subject
    weight_format: WeightFormat | None
    """What the base is quantised to at the first step; None leaves it as it is."""
    targets: list[str]
    training: EncodedData
    held_out: EncodedData
    steps: int
    learning_rate: float
    dense_steps: int
    """Steps before the weights are rounded."""
    plan: MemoryPlan


def resumed_config(config: TrainConfig, run: Path) -> TrainConfig:
    """Return the run's own configuration; raises GraftError where the given one contradicts it."""
    if not is_run(run):
        raise GraftError(f"--resume: {run} is no run folder (it has no {CONFIG})")
    stored, problems = read_run_config(run), []
    if not stored.data:
        raise GraftError(f"--resume: {run} was adopted, not trained, and has nothing to go on from")
    for field in dataclasses.fields(TrainConfig):
        given, before = getattr(config, field.name), getattr(stored, field.name)
        free = field.name in RESUME_MAY_CHANGE or field.name == "out"
        if not free and given not in (before, field.default, None):
            problems.append(f"{field.name} is {given!r}, the run was begun with {before!r}")
    raise_problems(problems, "--resume goes on with the same settings")
    names = ("eval_every", "save_every", "checkpointing", "device")
    changes = {name: getattr(config, name) for name in names}
    changed = {name: value for name, value in changes.items() if value not in (None, "auto")}
    changed |= {"out": config.out, "trust_remote_code": config.trust_remote_code}
    return dataclasses.replace(stored, **changed, resume=True)


def prepare(config: TrainConfig, events: Events) -> Prepared:
    """Check everything that can be checked without weights, and fill in every default.

    Raises GraftError with all problems at once; nothing is written.
    """
    problems = Problems()
    with problems.collecting():
        check_train_config(config)
    if not config.resume and Path(config.out).exists():
        problems.found.append(
            f"{config.out} exists already; choose another --out, remove it, or go on with --resume"
        )
    subject = open_subject(config.model, config.trust_remote_code)
    tokenizer = subject.tokenizer
    targets: list[str] = []
    with problems.collecting():
        targets = select_targets(subject.skeleton, config.targets)
        check_checkpointing(subject.skeleton, config.checkpointing)
        check_bias_exports(config, subject.skeleton, targets)
    kind: str | None = None
    with problems.collecting():
        limit = subject.position_limit
        training, held_out = load_train_and_eval(config, tokenizer, limit, config.seed)
        kind = training.kind
        if config.objective in OBJECTIVES:
            OBJECTIVES[config.objective].check_rows(kind)
    with problems.collecting():
        weight_format = base_format(config, subject)
        exported = exported_formats(config, subject, weight_format, targets)
        check_exports(config, subject.config, exported, tokenizer, kind)
    problems.raise_all("nothing was started")
    for name, data in (("training", training), ("held out", held_out)):
        events.note(f"{name}: {data.summary()}")
    return _resolved(config, subject, weight_format, targets, training, held_out, events)


def _resolved(
    config: TrainConfig,
    subject: Subject,
    weight_format: WeightFormat | None,
    targets: list[str],
    training: EncodedData,
    held_out: EncodedData,
    events: Events,
) -> Prepared:
    """Fill in the defaults, which follow from the method, the model, the data and the memory."""
    method = method_of(config)
    config = config.resolved(None if weight_format is None else weight_format.bits)
    plan = plan_memory(
        subject,
        weight_format=weight_format,
        adapter=config,
        dtype=method.compute_dtype(config.dtype),
        device=config.device,
        batch_size=config.batch_size,
        sequence_length=max(len(example.input_ids) for example in training.examples),
        checkpointing=config.checkpointing,
        optimizer=config.optimizer,
        calibration_rows=calibrating_rows(config),
    )
    if config.checkpointing == "auto":
        events.note(f"checkpointing: {plan.checkpointing_reason}")
    steps = steps_to_train(config, len(training.examples))
    dense_steps = method.dense_steps(config, steps)
    chosen = {} if weight_format is None else settings_of(weight_format)
    if config.bits == "auto":
        chosen["bits"] = config.bits
    if weight_format is not None:
        weight_format = method.training_format(weight_format, dense_steps)
    rate = config.learning_rate or default_learning_rate(config, subject.hidden_size)
    resolved = dataclasses.replace(
        config,
        learning_rate=rate,
        steps=steps,
        epochs=None,
        checkpointing=plan.checkpointing,
        solver=chosen_solver(config, config.method, config.bits),
        **chosen,
    )
    return Prepared(
        config=resolved,
        method=method,
        subject=subject,
        weight_format=weight_format,
        targets=targets,
        training=training,
        held_out=held_out,
        steps=steps,
        learning_rate=rate,
        dense_steps=dense_steps,
        plan=plan,
    )
