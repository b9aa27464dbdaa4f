"""Fine-tuning: from a configuration to a run folder with an adapter and a report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from graft.adapters.attach import code_widths
from graft.adapters.starts.base import Packer
from graft.adapters.starts.registry import STARTS
from graft.api.config import TrainConfig, as_plain
from graft.api.events import Events
from graft.api.export import export_model
from graft.api.run.base import load_base
from graft.api.run.folder import PromptStyle, write_prompt_style
from graft.api.run.layout import ADAPTER, BASE, CONFIG, METRICS, MODEL, START
from graft.api.run.prepare import Prepared, prepare, resumed_config
from graft.api.run.report import RunReport, make_report, stored_bits_per_weight, write_report
from graft.calibrate.latents import round_latents
from graft.calibrate.registry import SOLVERS
from graft.errors import GraftError
from graft.evaluate.loss import evaluate_loss
from graft.export.registry import TARGETS
from graft.files.write import write_yaml
from graft.model.adapter_files import save_adapter
from graft.model.load import LoadedModel
from graft.model.running.attention import use_own_attention
from graft.model.running.checkpointing import enable_checkpointing
from graft.model.running.memory import free_bytes, reuse_freed_memory
from graft.model.running.pointwise import use_own_pointwise
from graft.model.running.prefetch import prefetch_layers
from graft.model.save import save_model
from graft.objectives.base import LossResult
from graft.objectives.registry import OBJECTIVES
from graft.optimizers.registry import OPTIMIZERS
from graft.train.loop import Metrics, TrainingTask, read_metrics, train
from graft.train.schedule import rate_factors


def finetune(config: TrainConfig, events: Events | None = None) -> RunReport:
    """Run a fine-tuning and write its folder config.out; return the report.

    Everything that can be checked is checked before a weight is read; all problems are raised at
    once as a GraftError, and then nothing has been written.
    """
    events = events or Events()
    begin = time.perf_counter()
    run = Path(config.out)
    if config.resume:
        config = resumed_config(config, run)
    prepared = prepare(config, events)
    config = prepared.config
    if not config.resume:
        _make_run_folder(run, prepared)
    packer = STARTS[config.init].packer(config)
    try:
        loaded = load_base(prepared, run, packer, events)
    except BaseException:
        if not config.resume:
            shutil.rmtree(run, ignore_errors=True)
        raise
    parameters = _make_trainable(loaded, prepared)
    if not config.resume:
        _start(loaded, config, packer, run, events)
    metrics = _train(loaded, prepared, parameters, run, events)
    _save_result(loaded, prepared, run)
    report = make_report(
        run=run,
        config=config,
        base=prepared.subject.folder,
        model=loaded.model,
        metrics=metrics,
        plan=prepared.plan,
        training=prepared.training,
        held_out=prepared.held_out,
        steps=prepared.steps,
        learning_rate=prepared.learning_rate,
        trainable=sum(parameter.numel() for parameter in parameters.values()),
        seconds=time.perf_counter() - begin,
        bits_per_weight=stored_bits_per_weight(loaded.model),
    )
    write_report(run, report, read_metrics(run / METRICS))
    del loaded, parameters
    for target in config.export:
        path = run / "export" / TARGETS[target].default_name
        if not path.exists():
            exported = export_model(run, target, path, events=events)
            events.note(f"exported {exported.path}")
    return report


def _make_run_folder(run: Path, prepared: Prepared) -> None:
    """Make the run's folder with the resolved configuration."""
    settings = as_plain(prepared.config)
    del settings["resume"]
    try:
        run.mkdir(parents=True)
        write_yaml(run / CONFIG, settings)
        style = PromptStyle(prepared.training.kind, prepared.config.separator)
        write_prompt_style(run, style)
    except OSError as error:
        raise GraftError(f"{run} cannot be written: {error.strerror}") from error


def _make_trainable(loaded: LoadedModel, prepared: Prepared) -> dict[str, nn.Parameter]:
    """Let the method choose what trains, and graft's kernels compute; return it by name."""
    config, model = prepared.config, loaded.model
    torch.manual_seed(config.seed)
    use_own_attention(model)
    enable_checkpointing(model, prepared.plan.checkpointing)
    parameters = prepared.method.make_trainable(model, prepared.targets, config)
    use_own_pointwise(model)  # which leaves norms that train
    return parameters


def _start(
    loaded: LoadedModel, config: TrainConfig, packer: Packer | None, run: Path, events: Events
) -> None:
    """Begin the adapters; a start that changed the base is kept, for a merge into another one."""
    start = STARTS[config.init]
    note = start.begin(loaded.model, packer)
    if start.changes_base:
        if (run / START).is_dir():
            shutil.rmtree(run / START)
        save_adapter(loaded.model, run / START, base=str(run / BASE), init=config.init)
    if note is not None:
        events.note(note)


def _train(
    loaded: LoadedModel,
    prepared: Prepared,
    parameters: dict[str, nn.Parameter],
    run: Path,
    events: Events,
) -> Metrics:
    config = prepared.config
    objective = OBJECTIVES[config.objective]

    def evaluate() -> LossResult:
        examples = prepared.held_out.examples
        return evaluate_loss(loaded.model, examples, config.batch_size, objective)

    widths = code_widths(loaded.model, parameters)
    task = TrainingTask(
        model=loaded.model,
        parameters=parameters,
        examples=prepared.training.examples,
        objective=objective,
        evaluate=evaluate,
        optimizer=OPTIMIZERS[config.optimizer],
        learning_rate=prepared.learning_rate,
        rate_factors=rate_factors(config, prepared.subject.hidden_size, widths),
        steps=prepared.steps,
        folder=run,
        before_step=_rounding(loaded, prepared, run, events) if prepared.dense_steps else None,
    )
    if loaded.model.device.type == "cpu":
        reuse_freed_memory()
    with prefetch_layers(loaded.model, free_bytes(loaded.model.device) or 0):
        return train(task, config, events.metrics, events.training_begins)


def _rounding(
    loaded: LoadedModel, prepared: Prepared, run: Path, events: Events
) -> Callable[[int], None]:
    """Return what rounds the weights before the step after the last dense one."""
    config = prepared.config
    rows = prepared.training.examples[: config.calibration_rows]

    def before_step(step: int) -> None:
        if step == prepared.dense_steps + 1:
            assert config.solver is not None, "it is filled in"
            round_latents(
                loaded.model,
                [torch.tensor([row.input_ids]) for row in rows],
                config.damping,
                SOLVERS[config.solver],
                lambda done, total: events.progress("rounding", done, total),
                lambda: save_model(loaded, run / BASE),
            )

    return before_step


def _save_result(loaded: LoadedModel, prepared: Prepared, run: Path) -> None:
    for name in (ADAPTER, MODEL):
        if (run / name).is_dir():
            shutil.rmtree(run / name)
    if prepared.method.trains_adapter:
        base = run / BASE if (run / BASE).is_dir() else Path(prepared.config.model)
        save_adapter(loaded.model, run / ADAPTER, base=str(base), init=prepared.config.init)
    else:
        loaded.model.requires_grad_(False)
        save_model(loaded, run / MODEL)
