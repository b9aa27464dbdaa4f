"""Fine-tuning: from a configuration to a run folder with an adapter and a report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from graft.adapters.attach import code_widths
from graft.adapters.starts.base import DEFAULT
from graft.adapters.starts.registry import STARTS
from graft.api.config import TrainConfig
from graft.api.events import Events
from graft.api.export import export_model
from graft.api.run.base import load_base, save_base
from graft.api.run.layout import (
    ADAPTER,
    BASE,
    EXPORTS,
    FAILED_BATCH,
    METRICS,
    MODEL,
    PLOTS,
    REPORT,
    REPORT_TEXT,
    START,
)
from graft.api.run.prepare import Prepared, prepare
from graft.api.run.reference import References
from graft.api.run.report import RunReport, make_report, stored_bits_per_weight, write_report
from graft.api.run.resume import (
    Resumed,
    begin_run,
    check_finished_inputs,
    find_place,
    finished_report,
    lost_run,
    merged_settings,
    owned_run,
    read_stored,
    settle,
)
from graft.api.run.starting import begin_adapters, prepare_layers, taken_out
from graft.api.run.status import StatusFile, resume_command
from graft.api.run.teacher import load_teacher
from graft.api.run.watching import Watching
from graft.calibrate.latents import round_latents
from graft.calibrate.registry import SOLVERS
from graft.data.examples import Example
from graft.evaluate.loss import evaluate_loss
from graft.export.registry import TARGETS
from graft.files.write import remove_folder
from graft.layers.activations import compute_with
from graft.model.adapter_files import check_adapter, read_factors, save_adapter
from graft.model.hub import base_name
from graft.model.load import LoadedModel
from graft.model.running.attention import use_own_attention
from graft.model.running.checkpointing import enable_checkpointing
from graft.model.running.memory import free_bytes, reuse_freed_memory
from graft.model.running.packing import check_packing
from graft.model.running.pointwise import use_own_pointwise
from graft.model.running.prefetch import prefetch_layers
from graft.model.running.rotary import use_own_rotary
from graft.model.save import save_model
from graft.objectives.base import LossResult, Objective
from graft.objectives.registry import OBJECTIVES
from graft.optimizers.registry import OPTIMIZERS
from graft.train.loop import train
from graft.train.metrics import read_metrics
from graft.train.schedule import rate_factors
from graft.train.stop import Stop, StoppedError
from graft.train.task import TrainingTask
from graft.train.trackers import Tracker


def finetune(
    config: TrainConfig,
    events: Events | None = None,
    stop: Stop | None = None,
    trackers: Sequence[Tracker] = (),
) -> RunReport:
    """Run a fine-tuning and write its folder config.out; return the report.

    Everything that can be checked is checked before a weight is read; all problems are raised at
    once as a GraftError, and then nothing has been written. With config.resume the run in the
    folder goes on, bit for bit, from its newest checkpoint that is whole, or is begun anew where
    there is none; one that has finished may be given more steps. Settings that are given (not None)
    must be the run's own. Trackers are told of metrics, samples and the report, as those are that
    the configuration names; one that fails ends nothing. When `stop` is asked the training ends
    with a checkpoint and raises StoppedError; nothing asks without it.
    """
    events, stop = events or Events(), stop or Stop()
    begin = time.perf_counter()
    run = Path(config.out)
    with ExitStack() as owning:
        resumed: Resumed | None = None
        if config.resume and run.is_dir():
            owning.enter_context(owned_run(run))
            stored = read_stored(run)
            if stored is None:
                resumed = lost_run(config, run, events)
            else:
                config = merged_settings(config, stored, run)
                if report := _finished(run, config, config.steps, events):
                    return report
                resumed = find_place(config, stored, run, events)
        elif config.resume:
            events.note(f"there is no {run}: the run is begun")
        rounded, unrounded = (
            (None, 0) if resumed is None else (resumed.dense_steps, resumed.unrounded)
        )
        prepared = prepare(config, events, rounded, unrounded)
        config = prepared.config
        if resumed is None:
            begin_run(run, prepared)
            owning.enter_context(owned_run(run))
        elif report := _finished(run, config, prepared.steps, events):  # as --epochs say
            return report
        else:
            settle(run, prepared, resumed, events)
        status = StatusFile(run, prepared.steps, begin, anew=resumed is None or not resumed.step)
        try:
            with status.kept():
                report = _carry_out(run, prepared, resumed, status, events, stop, trackers)
        except StoppedError as stopped:
            command = resume_command(run, config.trust_remote_code)
            raise StoppedError(f"{stopped}. Go on with: {command}", stopped.step) from stopped
        _export(run, config, events)
    return report


def _finished(
    run: Path, config: TrainConfig, steps: int | None, events: Events
) -> RunReport | None:
    """Return the report of a run that has finished so many steps, with its exports made."""
    report = finished_report(run, config.keep, steps)
    if report is not None:
        check_finished_inputs(run, config)
        events.note(
            f"{run} has finished its {steps} steps, so there is nothing to train; more --steps or "
            "--epochs train it further"
        )
        _export(run, config, events)
    return report


def _carry_out(
    run: Path,
    prepared: Prepared,
    resumed: Resumed | None,
    status: StatusFile,
    events: Events,
    stop: Stop,
    trackers: Sequence[Tracker],
) -> RunReport:
    """Load, train, and write the result and its report."""
    config = prepared.config
    checkpoint, step = (None, 0) if resumed is None else (resumed.checkpoint, resumed.step)
    status.begins(step)
    preparation = STARTS[config.init].prepare(config)
    objective = OBJECTIVES[config.objective].configured(config)
    references = References(run, prepared, events) if objective.needs_reference else None
    if references is not None and checkpoint is not None:
        references.read()  # before the model is there, beside which another might find no room
    try:
        loaded = load_base(prepared, run, preparation, events, stop)
        ranks = prepare_layers(loaded, prepared, preparation, run, checkpoint, events, stop)
        parameters = _make_trainable(loaded, prepared, ranks)
        compute_with(loaded.model, config.activations or "float")
    except Exception:
        if resumed is None:  # nothing has begun
            remove_folder(run)
        raise
    if checkpoint is None:
        begin_adapters(loaded, prepared, preparation, run, events)
    rows = prepared.training.examples, prepared.held_out.examples
    if references is not None:
        if checkpoint is None:
            references.find_out(loaded)
        rows = references.training(), references.held_out()
    if prepared.teacher is not None:
        objective = objective.taught(load_teacher(prepared.teacher, config).model)
    task = _task(loaded, prepared, objective, rows, parameters, run, events, stop)
    watching = Watching(run, prepared, loaded, events, trackers)
    task = dataclasses.replace(
        task, checkpoint=checkpoint, on_saved=status.saved, on_evaluated=watching.evaluated
    )
    if loaded.model.device.type == "cpu":
        reuse_freed_memory(sparing=prepared.plan.checkpointing == "layers")
    with prefetch_layers(loaded.model, free_bytes(loaded.model.device) or 0):
        watching.begins(anew=checkpoint is None)
        trained = train(task, config, watching.metrics, events.training_begins)
        drift = watching.drift()
    _save_result(loaded, prepared, run)
    report = make_report(
        run=run,
        config=config,
        base=prepared.subject.folder,
        model=loaded.model,
        trained=trained,
        drift=drift,
        plan=prepared.plan,
        batching=prepared.batching,
        training=prepared.training,
        held_out=prepared.held_out,
        steps=prepared.steps,
        learning_rate=prepared.learning_rate,
        trainable=sum(parameter.numel() for parameter in parameters.values()),
        seconds=status.seconds,
        bits_per_weight=stored_bits_per_weight(loaded.model),
    )
    write_report(run, report, read_metrics(run / METRICS))
    watching.ends(report)
    status.finished(trained.step)
    return report


def _make_trainable(
    loaded: LoadedModel, prepared: Prepared, ranks: Mapping[str, int] | None
) -> dict[str, nn.Parameter]:
    """Let the method choose what trains, and graft's kernels compute; return it by name."""
    config, model = prepared.config, loaded.model
    torch.manual_seed(config.seed)
    use_own_attention(model)
    if config.batching == "packed":
        check_packing(model)
    enable_checkpointing(model, prepared.plan.checkpointing)
    parameters = prepared.method.make_trainable(model, prepared.targets, config, ranks)
    use_own_pointwise(model)  # which leaves norms that train
    use_own_rotary(model)
    return parameters


def _task(
    loaded: LoadedModel,
    prepared: Prepared,
    objective: Objective,
    rows: tuple[Sequence[Example], Sequence[Example]],
    parameters: dict[str, nn.Parameter],
    run: Path,
    events: Events,
    stop: Stop,
) -> TrainingTask:
    """Return what the loop works on; rows: those that train, and those that are held out."""
    config = prepared.config

    def evaluate() -> LossResult:
        return evaluate_loss(loaded.model, rows[1], config.batch_size, objective, stop.check)

    widths = code_widths(loaded.model, parameters)
    rounding = _rounding(loaded, prepared, run, events, stop)
    return TrainingTask(
        model=loaded.model,
        parameters=parameters,
        examples=rows[0],
        objective=objective,
        evaluate=evaluate,
        optimizer=OPTIMIZERS[config.optimizer],
        learning_rate=prepared.learning_rate,
        rate_factors=rate_factors(config, prepared.subject.hidden_size, widths),
        steps=prepared.steps,
        folder=run,
        before_step=rounding if prepared.dense_steps else None,
        first_kept=prepared.dense_steps + 1,
        on_note=events.note,
        stop=stop,
    )


def _rounding(
    loaded: LoadedModel, prepared: Prepared, run: Path, events: Events, stop: Stop
) -> Callable[[int], None]:
    """Return what rounds the weights before the step after the last dense one."""
    config = prepared.config
    rows = prepared.calibration

    def on_layer(done: int, total: int) -> None:
        stop.check()
        events.progress("rounding", done, total)

    def before_step(step: int) -> None:
        if step == prepared.dense_steps + 1:
            assert config.solver is not None, "it is filled in"
            round_latents(
                loaded.model,
                [torch.tensor([row.input_ids]) for row in rows],
                config.damping,
                SOLVERS[config.solver],
                on_layer,
                lambda: save_base(loaded, run),
            )

    return before_step


def _save_result(loaded: LoadedModel, prepared: Prepared, run: Path) -> None:
    """Write what was trained in the place of an earlier part's, whose exports are stale then."""
    for target in prepared.config.export:
        for stale in _export_paths(run, target):
            remove_folder(stale)
    # The report first: one of an earlier part never lies beside this part's result.
    for name in (REPORT, REPORT_TEXT, PLOTS, ADAPTER, MODEL, FAILED_BATCH):
        remove_folder(run / name)
    if prepared.method.trains_adapter:
        config, start = prepared.config, STARTS[prepared.config.init]
        began = read_factors(run / START) if taken_out(prepared) else None
        own = start.changes_base and began is None
        save_adapter(
            loaded.model,
            run / ADAPTER,
            base=str(run / BASE) if own else base_name(config.model),
            init=start.name if began is None else DEFAULT.name,
            began=began,
        )
        check_adapter(loaded.model, run / ADAPTER, began=began)
    else:
        loaded.model.requires_grad_(False)
        save_model(loaded, run / MODEL)


def _export(run: Path, config: TrainConfig, events: Events) -> None:
    """Make the exports that are not there, or not with their cards."""
    for target in config.export:
        paths = _export_paths(run, target)
        if all(path.exists() for path in paths):
            continue
        for path in paths:
            remove_folder(path)
        trust = config.trust_remote_code
        exported = export_model(run, target, paths[0], trust_remote_code=trust, events=events)
        events.note(f"exported {exported.path}")
        for note in exported.notes:
            events.note(f"{exported.path.name}: {note}")


def _export_paths(run: Path, target: str) -> tuple[Path, Path]:
    """Return where a run's own export to a target lies, and its card."""
    path = run / EXPORTS / TARGETS[target].default_name
    return path, TARGETS[target].card_path(path)
