"""Everything that can be known of a run before a weight is read."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from graft.adapters.method import Method
from graft.adapters.registry import method_of
from graft.api.checks import calibrating_rows, check_train_config, chosen_solver, looking_rows
from graft.api.config import TrainConfig
from graft.api.events import Events
from graft.api.export import check_bias_exports, check_exports, check_factor_exports
from graft.api.run.batching import chosen_batching, plan_batches
from graft.api.run.folder import is_run, prompt_style
from graft.api.run.formats import base_format, exported_formats
from graft.api.run.status import taken
from graft.api.run.teacher import open_teacher, teacher_format
from graft.api.run.watched import Watched, watched
from graft.data.chat import DEFAULT_CHAT_TEMPLATE
from graft.data.conversations.named import choose_template
from graft.data.encode import EncodedData
from graft.data.examples import Example, sequences_of, side_names
from graft.data.joint import joint_notes
from graft.data.load import load_train_and_eval, resolve_max_length
from graft.data.shapes.registry import SHAPES
from graft.errors import Problems
from graft.formats.base import WeightFormat
from graft.formats.registry import settings_of
from graft.model.devices import dtype_note, resolve_device, resolve_dtype
from graft.model.pieces import one_line, pieces_of
from graft.model.running.checkpointing import check_checkpointing
from graft.model.subject import Subject, open_subject
from graft.model.tokenizer_itself import tokenizer_note
from graft.model.tokens import check_tokens
from graft.model.trained import trained_note, what_trains
from graft.objectives.registry import DEFAULT_OBJECTIVE, OBJECTIVES
from graft.plan.memory import MemoryPlan, plan_memory
from graft.train.gates import data_notes
from graft.train.schedule import default_learning_rate, steps_to_train


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
    """The layers that are adapted, or the parameters that train, by name."""
    training: EncodedData
    held_out: EncodedData
    steps: int
    learning_rate: float
    dense_steps: int
    """Steps before the weights are rounded."""
    plan: MemoryPlan
    batching: str
    """How the rows become tensors, and what that saves, in words."""
    watched: Watched
    teacher: Subject | None = None
    """The model that it learns from, beside the rows."""

    @property
    def calibration(self) -> list[Example]:
        """Rows that a solver may look at, each sequence of a pair as one of its own."""
        some = self.training.examples[: self.config.calibration_rows]
        sides = [side for example in some for side in sequences_of(example)]
        return sides[: self.config.calibration_rows]


def prepare(
    config: TrainConfig, events: Events, dense_steps: int | None = None, unrounded: int = 0
) -> Prepared:
    """Check everything that can be checked without weights, and fill in every default.

    dense_steps: after how many steps a run that is resumed has rounded its weights, where it has.
    unrounded: how many steps it has done, where it rounds them later. Raises GraftError with all
    problems at once; nothing is written.
    """
    problems = Problems()
    with problems.collecting():
        check_train_config(config)
    if not config.resume:
        problems.found += _taken(Path(config.out))
    subject = open_subject(config.model, config.trust_remote_code)
    tokenizer = subject.tokenizer
    targets: list[str] = []
    with problems.collecting():
        targets = what_trains(subject.skeleton, config)
        check_checkpointing(subject.skeleton, config.checkpointing)
        check_bias_exports(config, subject.skeleton, targets)
        check_factor_exports(config, subject.factors)
    kind: str | None = None
    with problems.collecting():
        choose_template(tokenizer, config.chat_template, _begun_with(config))
        limit = subject.position_limit
        known = config.objective in OBJECTIVES
        objective = OBJECTIVES[config.objective if known else DEFAULT_OBJECTIVE]
        training, held_out = load_train_and_eval(
            config, tokenizer, limit, config.seed, events, objective.holds
        )
        longest = resolve_max_length(config, limit)
        training, held_out = (objective.arranged(one, longest) for one in (training, held_out))
        kind = training.kind
        if SHAPES[kind].is_conversation and tokenizer.chat_template is None:
            tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE  # which is saved with the model
        if known:
            objective.check_rows(kind)
        check_tokens(subject.skeleton, tokenizer, training.examples, held_out.examples)
        seen = watched(config, subject, held_out)
    with problems.collecting():
        if config.objective in OBJECTIVES:
            config = dataclasses.replace(config, batching=chosen_batching(config, subject))
    with problems.collecting():
        weight_format = base_format(config, subject)
        exported = exported_formats(config, subject, weight_format, targets)
        check_exports(config, subject.config, exported, tokenizer, kind)
    teacher: Subject | None = None
    with problems.collecting():
        if config.teacher is not None:
            teacher = open_teacher(config, subject)
    problems.raise_all("nothing was started")
    asked = method_of(config).compute_dtype(config.dtype)
    computed = resolve_dtype(asked, subject.source_dtype, resolve_device(config.device))
    for note in filter(None, [*subject.notes, dtype_note(subject.source_dtype, computed)]):
        events.note(note)
    for name, data in (("training", training), ("held out", held_out)):
        events.note(f"{name}: {data.summary()}")
    for note in filter(
        None, [tokenizer_note(tokenizer), *joint_notes(config, tokenizer, objective.holds)]
    ):
        events.note(note)
    first = training.examples[0]
    for side, name in zip(sequences_of(first), side_names(first), strict=False):
        row = one_line(pieces_of(side, tokenizer))
        place = f"{first.where}, {name}" if name else first.where
        events.note(f"the first training row ({place}), [trained] in brackets: {row}")
    for text in data_notes(training, held_out, config.eos):
        events.note(text)
    both = training, held_out
    resolved = _resolved(
        config, subject, weight_format, targets, both, seen, events, dense_steps, unrounded, teacher
    )
    return dataclasses.replace(resolved, teacher=teacher)


def _begun_with(config: TrainConfig) -> str | None:
    """Return the chat template that a run goes on with, whose file may have changed since."""
    if config.resume and config.chat_template is not None:
        return prompt_style(Path(config.out)).chat_template
    return None


def _taken(out: Path) -> list[str]:
    """Return why a new run cannot be made in a folder."""
    if is_run(out):
        return [taken(out)]
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        return [f"{out} exists already; choose another --out or remove it"]
    return []


def _resolved(
    config: TrainConfig,
    subject: Subject,
    weight_format: WeightFormat | None,
    targets: list[str],
    data: tuple[EncodedData, EncodedData],
    seen: Watched,
    events: Events,
    dense_steps: int | None,
    unrounded: int,
    teacher: Subject | None,
) -> Prepared:
    """Fill in the defaults, which follow from the method, the model, the data and the memory."""
    training, held_out = data
    method = method_of(config)
    config = config.resolved(None if weight_format is None else weight_format.bits)
    steps = steps_to_train(config, len(training.examples))
    batches = plan_batches(
        config, training, steps, resolve_max_length(config, subject.position_limit)
    )
    events.note(f"batches: {batches.words}")
    plan = plan_memory(
        subject,
        weight_format=weight_format,
        adapter=config,
        dtype=method.compute_dtype(config.dtype),
        device=config.device,
        batch_size=batches.sequences,
        sequence_length=batches.longest,
        tokens=batches.tokens,
        teacher=teacher,
        teacher_format=teacher_format(config),
        checkpointing=config.checkpointing,
        optimizer=config.optimizer,
        calibration_rows=calibrating_rows(config),
        looking_rows=looking_rows(config),
    )
    if plan.left_out is not None:
        events.note(plan.left_out)
    if not method.trains_adapter:
        events.note(trained_note(subject.skeleton, targets))
    if config.checkpointing == "auto":
        events.note(f"checkpointing: {plan.checkpointing_reason}")
    planned = method.dense_steps(config, steps)
    if dense_steps is None:
        dense_steps = max(planned, unrounded)
    if dense_steps != planned:  # it has more or fewer steps now than then
        config = dataclasses.replace(config, dense_fraction=dense_steps / steps)
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
        batching=batches.words,
        watched=seen,
    )
