"""Fine-tuning: from a configuration to a run folder with an adapter and a report."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graft.adapters.attach import adapter_parameters, attach_adapter, code_widths
from graft.adapters.starts.loftq import LoftQ
from graft.api.config import (
    WIDTHS,
    TrainConfig,
    as_plain,
    calibrating_rows,
    check_train_config,
    chosen_solver,
)
from graft.api.events import Events
from graft.api.export import check_bias_exports, check_exports, export_model
from graft.api.loftq_start import chosen_loftq, start_from_loftq
from graft.api.quantize import Rounding, load_quantised
from graft.api.run.base import base_format, exported_formats
from graft.api.run.folder import (
    ADAPTER,
    BASE,
    BASE_REFERENCE,
    CHECKPOINTS,
    CONFIG,
    METRICS,
    MODEL,
    PromptStyle,
    is_run,
    load_run_base,
    read_run_config,
    write_base_reference,
    write_prompt_style,
)
from graft.api.run.report import RunReport, make_report, stored_bits_per_weight, write_report
from graft.calibrate.latents import let_grid_wait, round_latents
from graft.calibrate.registry import SOLVERS
from graft.data.encode import EncodedData
from graft.data.load import load_train_and_eval
from graft.errors import GraftError, Problems, raise_problems
from graft.evaluate.loss import evaluate_loss
from graft.files import write_yaml
from graft.formats.base import WeightFormat
from graft.formats.latent import LatentFormat
from graft.model.adapter_files import save_adapter
from graft.model.folder import find_folder, read_config, read_tokenizer
from graft.model.load import LoadedModel
from graft.model.running.attention import use_own_attention
from graft.model.running.checkpointing import check_checkpointing, enable_checkpointing
from graft.model.running.memory import reuse_freed_memory
from graft.model.running.pointwise import use_own_pointwise
from graft.model.running.prefetch import prefetch_layers
from graft.model.save import save_model
from graft.model.subject import build_skeleton
from graft.model.targets import freeze_layers, select_targets
from graft.plan.memory import MemoryPlan, free_bytes, plan_memory
from graft.train.checkpoint import checkpoint_step, checkpoints
from graft.train.loop import Metrics, TrainingTask, read_metrics, steps_to_train, train
from graft.train.schedule import default_learning_rate, rate_factors

RESUME_MAY_CHANGE = {"resume", "eval_every", "save_every", "checkpointing", "device", "export"}
_METHODS_WITHOUT_ADAPTER = ("full",)


@dataclass(frozen=True)
class _Prepared:
    """What is known before any weight is read."""

    config: TrainConfig
    folder: Path
    weight_format: WeightFormat | None
    targets: list[str]
    training: EncodedData
    held_out: EncodedData
    steps: int
    learning_rate: float
    hidden_size: int
    dense_steps: int
    """Steps of merge_aware before the weights are rounded."""
    plan: MemoryPlan


def finetune(config: TrainConfig, events: Events | None = None) -> RunReport:
    """Run a fine-tuning and write its folder config.out; return the report.

    Everything that can be checked is checked before a weight is read; all problems are raised at
    once as a GraftError, and then nothing has been written.
    """
    events = events or Events()
    begin = time.perf_counter()
    run = Path(config.out)
    if config.resume:
        config = _resumed_config(config, run)
    prepared = _prepare(config, events)
    if not config.resume:
        _make_run_folder(run, prepared)
    loftq = chosen_loftq(config)
    try:
        loaded = _load_base(prepared, run, loftq, events)
    except BaseException:
        if not config.resume:
            shutil.rmtree(run, ignore_errors=True)
        raise
    parameters = _make_trainable(loaded, prepared)
    if loftq is not None and not config.resume:
        start_from_loftq(loaded, loftq, run, events)
    metrics = _train(loaded, prepared, parameters, run, events)
    _save_result(loaded, config, run)
    report = make_report(
        run=run,
        config=config,
        base=prepared.folder,
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
        path = run / "export" / ("model.gguf" if target == "gguf" else target)
        if not path.exists():
            exported = export_model(run, target, path, events=events)
            events.note(f"exported {exported.path}")
    return report


def _resumed_config(config: TrainConfig, run: Path) -> TrainConfig:
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
    return dataclasses.replace(stored, **changed, out=config.out, resume=True)


def _prepare(config: TrainConfig, events: Events) -> _Prepared:
    """Check everything that can be checked without weights; raises all problems at once."""
    problems = Problems()
    with problems.collecting():
        check_train_config(config)
    if not config.resume and Path(config.out).exists():
        problems.found.append(
            f"{config.out} exists already; choose another --out, remove it, or go on with --resume"
        )
    folder = find_folder(config.model)
    model_config = read_config(folder, config.trust_remote_code)
    tokenizer = read_tokenizer(folder, config.trust_remote_code)
    targets: list[str] = []
    with problems.collecting():
        skeleton = build_skeleton(model_config, config.trust_remote_code)
        targets = select_targets(skeleton, config.targets)
        check_checkpointing(skeleton, config.checkpointing)
        check_bias_exports(config, skeleton, targets)
    kind: str | None = None
    with problems.collecting():
        limit = getattr(model_config, "max_position_embeddings", None)
        training, held_out = load_train_and_eval(config, tokenizer, limit, config.seed)
        kind = training.kind
    with problems.collecting():
        weight_format = base_format(config, folder, model_config)
        exported = exported_formats(config, folder, weight_format, targets)
        check_exports(config, model_config, exported, tokenizer, kind)
    problems.raise_all("nothing was started")
    config = config.resolved(None if weight_format is None else weight_format.options().get("bits"))
    for name, data in (("training", training), ("held out", held_out)):
        events.note(f"{name}: {data.summary()}")
    hidden: int = model_config.get_text_config().hidden_size
    plan = plan_memory(
        str(folder),
        weight_format=weight_format,
        adapter=config,
        dtype=_dtype_name(config),
        device=config.device,
        batch_size=config.batch_size,
        sequence_length=max(len(example.input_ids) for example in training.examples),
        checkpointing=config.checkpointing,
        calibration_rows=calibrating_rows(config, config.method, config.bits),
        trust_remote_code=config.trust_remote_code,
    )
    if config.checkpointing == "auto":
        events.note(f"checkpointing: {plan.checkpointing_reason}")
    steps = steps_to_train(config, len(training.examples))
    # What is deployed has been trained as it is: one step at least is inside the rounding.
    dense_steps = min(round(steps * (config.dense_fraction or 0.0)), steps - 1)
    if isinstance(weight_format, LatentFormat):
        weight_format = dataclasses.replace(weight_format, rounds=dense_steps == 0)
    return _Prepared(
        config=config,
        folder=folder,
        weight_format=weight_format,
        targets=targets,
        training=training,
        held_out=held_out,
        steps=steps,
        learning_rate=config.learning_rate or default_learning_rate(config, hidden),
        hidden_size=hidden,
        dense_steps=dense_steps,
        plan=plan,
    )


def _dtype_name(config: TrainConfig) -> str:
    """Return the compute dtype; full training keeps its weights in float32 unless told otherwise.

    A bfloat16 weight does not move by less than 1/256 of itself, so small steps would be lost.
    """
    return "float32" if config.method == "full" and config.dtype == "auto" else config.dtype


def _make_run_folder(run: Path, prepared: _Prepared) -> None:
    """Make the run's folder with the resolved configuration."""
    resolved: dict[str, Any] = as_plain(prepared.config)
    resolved |= {"learning_rate": prepared.learning_rate, "steps": prepared.steps, "epochs": None}
    resolved["checkpointing"] = prepared.plan.checkpointing
    config = prepared.config
    resolved["solver"] = chosen_solver(config, config.method, config.bits)
    if prepared.weight_format is not None:
        options = prepared.weight_format.options()
        resolved["format"] = prepared.weight_format.name
        resolved |= {key: options[key] for key in ("bits", "group_size") if key in options}
        resolved |= {key: options[key] for key in ("double_quant",) if key in options}
        if isinstance(prepared.weight_format, LatentFormat):
            resolved["latent_dtype"] = prepared.weight_format.dtype
    if prepared.config.bits == "auto":
        resolved["bits"] = "auto"
    del resolved["resume"]
    try:
        run.mkdir(parents=True)
        write_yaml(run / CONFIG, resolved)
        style = PromptStyle(prepared.training.kind, prepared.config.separator)
        write_prompt_style(run, style)
    except OSError as error:
        raise GraftError(f"{run} cannot be written: {error.strerror}") from error


def _load_base(prepared: _Prepared, run: Path, loftq: LoftQ | None, events: Events) -> LoadedModel:
    config = prepared.config
    there = checkpoints(run / CHECKPOINTS)
    if prepared.dense_steps and (not there or checkpoint_step(there[-1]) <= prepared.dense_steps):
        shutil.rmtree(run / BASE, ignore_errors=True)  # rounded after the step that is resumed from
    if config.resume and ((run / BASE).is_dir() or (run / BASE_REFERENCE).is_file()):
        return load_run_base(run, config, _dtype_name(config), config.device)
    solver = "rtn" if prepared.dense_steps else chosen_solver(config, config.method, config.bits)
    rounding = Rounding(
        weight_format=prepared.weight_format,
        solver=solver,
        targets=config.targets,
        calibration=prepared.training.examples[: config.calibration_rows],
        damping=config.damping,
        start=None if loftq is None else loftq.pack,
        budget=config.budget,
        widths=[
            bits
            for bits in WIDTHS
            if bits != 8 or not {"gguf", "ollama", "onnx"} & {*config.export}
        ],
    )
    loaded = load_quantised(
        str(prepared.folder),
        rounding,
        dtype=_dtype_name(config),
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        events=events,
    )
    if prepared.weight_format is None:
        write_base_reference(run, prepared.folder)
        if config.method != "full":
            freeze_layers(loaded.model, prepared.targets)
    elif not prepared.dense_steps:
        save_model(loaded, run / BASE)
    return loaded


def _make_trainable(loaded: LoadedModel, prepared: _Prepared) -> dict[str, nn.Parameter]:
    """Attach the adapter (or, for full, free the weights) and return what trains, by name."""
    config, model = prepared.config, loaded.model
    torch.manual_seed(config.seed)
    use_own_attention(model)
    enable_checkpointing(model, prepared.plan.checkpointing)
    if config.method not in _METHODS_WITHOUT_ADAPTER:
        attach_adapter(model, prepared.targets, config)
        if config.method == "merge_aware":
            let_grid_wait(model)
        use_own_pointwise(model)
        return adapter_parameters(model, "default")
    inside = tuple(f"{name}." for name in prepared.targets)
    chosen = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not config.targets or name.startswith(inside)
    }
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    use_own_pointwise(model)  # which leaves norms that train
    return chosen


def _train(
    loaded: LoadedModel,
    prepared: _Prepared,
    parameters: dict[str, nn.Parameter],
    run: Path,
    events: Events,
) -> Metrics:
    config = prepared.config

    def evaluate() -> tuple[float, int]:
        result = evaluate_loss(loaded.model, prepared.held_out.examples, config.batch_size)
        return result.loss, result.target_tokens

    widths = code_widths(loaded.model, parameters)
    task = TrainingTask(
        model=loaded.model,
        parameters=parameters,
        examples=prepared.training.examples,
        evaluate=evaluate,
        learning_rate=prepared.learning_rate,
        rate_factors=rate_factors(config, prepared.hidden_size, widths),
        steps=prepared.steps,
        folder=run,
        before_step=_rounding(loaded, prepared, run, events) if prepared.dense_steps else None,
    )
    events.training_begins(prepared.steps, 1)
    if loaded.model.device.type == "cpu":
        reuse_freed_memory()
    with prefetch_layers(loaded.model, free_bytes(loaded.model.device) or 0):
        return train(task, config, events.metrics)


def _rounding(
    loaded: LoadedModel, prepared: _Prepared, run: Path, events: Events
) -> Callable[[int], None]:
    """Return what rounds the weights before the step after the last dense one."""
    rows = prepared.training.examples[: prepared.config.calibration_rows]

    def before_step(step: int) -> None:
        if step == prepared.dense_steps + 1:
            round_latents(
                loaded.model,
                [torch.tensor([row.input_ids]) for row in rows],
                prepared.config.damping,
                SOLVERS[chosen_solver(prepared.config, "merge_aware")],
                lambda done, total: events.progress("rounding", done, total),
                lambda: save_model(loaded, run / BASE),
            )

    return before_step


def _save_result(loaded: LoadedModel, config: TrainConfig, run: Path) -> None:
    for name in (ADAPTER, MODEL):
        if (run / name).is_dir():
            shutil.rmtree(run / name)
    if config.method in _METHODS_WITHOUT_ADAPTER:
        loaded.model.requires_grad_(False)
        save_model(loaded, run / MODEL)
    else:
        base = run / BASE if (run / BASE).is_dir() else Path(config.model)
        save_adapter(loaded.model, run / ADAPTER, base=str(base), init=config.init)
