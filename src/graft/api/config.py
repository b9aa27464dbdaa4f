"""The configuration of each command, put together from those of the components."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from graft.adapters.config import GRID_METHODS, AdapterConfig
from graft.calibrate.config import SolverConfig
from graft.calibrate.registry import SOLVERS
from graft.data.config import DataConfig
from graft.errors import raise_problems
from graft.export.config import ExportTarget
from graft.formats.config import FormatConfig
from graft.model.config import ModelConfig
from graft.train.config import LoopConfig

WIDTHS = (2, 3, 4, 8)
"""What --bits auto chooses from; 8 not where a GGUF or ONNX is asked for, which cannot hold it."""
NARROW = (2, 3)
"""Widths at which the method's default solver looks at calibration text."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig, DataConfig, AdapterConfig, SolverConfig, FormatConfig, ModelConfig):
    """A training run."""

    export: tuple[ExportTarget, ...] = ()
    """Exports to write into the run's folder at the end; whether they can be written is checked
    before training starts."""


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig(SolverConfig, FormatConfig, ModelConfig):
    """A quantisation without training."""

    out: str
    """Folder to write the quantised model to."""
    data: str | None = None
    """File of examples whose text calibrates the gptq and qep solvers."""
    targets: tuple[str, ...] = ()
    """Layers to quantise: names, suffixes, or regular expressions; none means every linear layer
    but the output head."""
    calibration_length: int = 512
    """Most tokens of a calibration row."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig(AdapterConfig, FormatConfig, SolverConfig, ModelConfig):
    """A prediction of memory."""

    batch_size: int = 16
    """Rows that are computed at once."""
    max_length: int = 512
    """Tokens in a row."""
    checkpointing: Literal["auto", "none", "products", "half", "layers"] = "auto"
    """What each decoder layer keeps for the backward pass: everything (none), its input and its
    matrix products (products), most of those (half), or little more than its input (layers). auto
    takes the first of them whose planned peak fits into 80 % of the memory that is free now."""
    json: bool = False
    """Print one JSON object instead of a table."""


def format_description(
    config: FormatConfig, method: str | None, float32: bool = False
) -> dict[str, Any] | None:
    """Return {'format': ..., options}, with the method's defaults filled in; None for dense.

    qlora: nf4 with double quantisation; qalora and affine: int, 4 bits, groups of 32; merge_aware:
    latent, likewise, which keeps float32 weights where that is asked for, if latent_dtype says
    nothing else; lora and full: the weights as they are. With bits auto it is the format that
    memory is planned for. Raises GraftError with every option that does not fit.
    """
    defaults = {"qlora": "nf4", **GRID_METHODS}
    name = config.format or defaults.get(method or "", "dense")
    problems = []
    if method == "full" and name != "dense":
        problems.append(
            f"method full trains every weight, and {name} weights are frozen codes that no "
            "optimizer can move; train with qlora, qalora or affine, or drop --format"
        )
    needed = GRID_METHODS.get(method or "", name)
    if name != needed:
        problems.append(
            f"method {method} trains on weights in the {needed} format, not {name}. Drop --format, "
            "or train with qlora"
        )
    if method == "qlora" and name == "dense":
        problems.append("method qlora needs quantised weights; train with lora, or drop --format")
    grouped = ("int", "latent")
    if name not in grouped and (config.bits is not None or config.group_size is not None):
        problems.append(
            f"--bits and --group-size belong to the int and latent formats; the format is {name}"
        )
    if (config.bits == "auto") != (config.budget is not None):
        problems.append("--bits auto and --budget belong together; give both or neither")
    if config.bits == "auto" and name == "latent":
        problems.append("--bits auto chooses widths of the int format; give merge_aware one width")
    if name != "latent" and config.latent_dtype is not None:
        problems.append(
            f"--latent-dtype belongs to the latent format, merge_aware's; the format is {name}"
        )
    elif config.bits == 8 and config.latent_dtype in ("bfloat16", "int8"):
        problems.append(
            f"--latent-dtype {config.latent_dtype} has no more digits than 8-bit codes; drop it"
        )
    if name not in ("nf4", "fp4") and config.double_quant:
        problems.append(f"--double-quant belongs to nf4 and fp4; the format is {name}")
    raise_problems(problems, "format")
    if name == "dense":
        return None
    if name in grouped:
        bits, group_size = config.bits or 4, config.group_size or 32
        if name == "latent":
            # bf16 has no more digits than 8-bit codes.
            dtype = config.latent_dtype or ("float32" if float32 or bits == 8 else "bfloat16")
            return {"format": name, "bits": bits, "group_size": group_size, "dtype": dtype}
        if bits == "auto":
            # Until the layers are measured: the narrowest width that fills the budget.
            statistics = 32 / group_size
            enough = [width for width in WIDTHS if width + statistics >= (config.budget or 0)]
            bits = (enough or WIDTHS[-1:])[0]
        return {"format": name, "bits": bits, "group_size": group_size}
    if name in ("nf4", "fp4"):
        double_quant = method == "qlora" if config.double_quant is None else config.double_quant
        return {"format": name, "double_quant": double_quant}
    return {"format": name}


def chosen_solver(
    config: SolverConfig, method: str | None = None, bits: int | str | None = None
) -> str:
    """Return the solver, with the default of the method on codes of `bits` filled in."""
    return config.solver or default_solver(method, bits)


def calibrating_rows(config: SolverConfig, method: str | None, bits: int | str | None) -> int:
    """Return on how many rows a run's weights are rounded; 0 where nothing needs any.

    merge_aware rounds by qep in mid-training, whatever its base began with; bits auto measures
    the layers of the dense model.
    """
    calibrated = SOLVERS[chosen_solver(config, method, bits)].needs_text or method == "merge_aware"
    return config.calibration_rows if calibrated or bits == "auto" else 0


def default_solver(method: str | None, bits: int | str | None = None) -> str:
    """Return the solver of a method's base: a calibrated one where what codes lose stays lost.

    merge_aware ends near where it starts, so it rounds as well as can be. The fewer bits, the less
    of the rounding a grid that moves makes up for; but what qep has over gptq, training of 300
    steps has made up for too.
    """
    if method == "merge_aware":
        return "qep"
    return "gptq" if bits in NARROW and method in GRID_METHODS else "rtn"


def check_solver(solver: str, description: dict[str, Any] | None) -> None:
    """Raise GraftError when a solver cannot round to the format of that description."""
    from graft.formats.registry import make_format  # torch, which a configuration does without

    # What a format offers a solver does not depend on its options, which may be wrong themselves.
    weight_format = None if description is None else make_format(description["format"])
    problem = SOLVERS[solver].problem(weight_format)
    raise_problems([] if problem is None else [problem], f"--solver {solver}")


def check_train_config(config: TrainConfig) -> None:
    """Raise GraftError with everything in the configuration that cannot work."""
    problems = []
    positive = {
        "rank": config.rank,
        "batch_size": config.batch_size,
        "grad_accum": config.grad_accum,
        "steps": config.steps,
        "epochs": config.epochs,
        "learning_rate": config.learning_rate,
        "alpha": config.alpha,
        "loftq_rounds": config.loftq_rounds,
        "max_grad_norm": config.max_grad_norm,
        "eval_every": config.eval_every,
        "save_every": config.save_every,
    }
    problems += [
        f"--{name.replace('_', '-')} is {value}; expected more than 0"
        for name, value in positive.items()
        if value is not None and not value > 0
    ]
    if config.steps is not None and config.epochs is not None:
        problems.append("--steps and --epochs are both given; give one of them")
    if config.dense_fraction is not None and config.method != "merge_aware":
        problems.append(f"--dense-fraction belongs to merge_aware, not to {config.method}; drop it")
    rounded_later = config.method == "merge_aware" and config.dense_fraction != 0
    solver = None if config.solver is None else SOLVERS[config.solver]
    if rounded_later and solver is not None and not solver.needs_text:
        calibrated = " or ".join(name for name in SOLVERS if SOLVERS[name].needs_text)
        problems.append(
            f"--solver {config.solver}: merge_aware rounds in mid-training, by {calibrated}; give "
            "one of them, or --dense-fraction 0 to round before training"
        )
    if config.grid_rank is not None and config.method not in ("merge_aware", "qalora"):
        problems.append(
            f"--grid-rank belongs to merge_aware and qalora, not to {config.method}; drop it"
        )
    if config.grid_rank is not None and config.grid_rank < 0:
        problems.append(f"--grid-rank is {config.grid_rank}; expected 0 or more")
    shares = {
        "dropout": config.dropout,
        "warmup-fraction": config.warmup_fraction,
        "dense-fraction": config.dense_fraction or 0.0,
    }
    for name, share in shares.items():
        if not 0 <= share < 1:
            problems.append(f"--{name} is {share}; expected 0 up to, but not including, 1")
    if config.method not in ("lora", "qlora"):
        if config.dropout:
            problems.append(
                f"--dropout: method {config.method} trains the very weights that it deploys, and "
                "dropout on the input has no such form; drop it, or use lora or qlora"
            )
        if config.adapter_bias:
            problems.append(f"--adapter-bias belongs to lora and qlora, not to {config.method}")
        if config.dora:
            problems.append(
                f"--dora scales the rows of a weight that an update is added to, and method "
                f"{config.method} adds none; drop it, or use lora or qlora"
            )
    elif config.dora and config.adapter_bias:
        problems.append(
            "--dora and --adapter-bias: the magnitudes scale the weight alone, and PEFT reads no "
            "DoRA with a bias; drop one of them"
        )
    if config.init == "loftq":
        problems += _loftq_problems(config)
    if "peft" in config.export and config.method in ("affine", "merge_aware", "full"):
        problems.append(f"--export peft: PEFT has no {config.method} adapter")
    if "peft" in config.export and config.method == "qalora" and config.grid_rank != 0:
        problems.append(
            "--export peft: qalora moves the scales too, which no LoRA can; give --grid-rank 0, "
            "or drop it"
        )
    raise_problems(problems, "configuration")


def _loftq_problems(config: TrainConfig) -> list[str]:
    problems = []
    if config.method not in ("lora", "qlora"):
        problems.append(
            f"--init loftq starts a low-rank update beside the weights; method {config.method} has "
            "none. Drop it, or use qlora"
        )
    elif config.method == "lora" and config.format in (None, "dense"):
        problems.append(
            "--init loftq makes up for rounding, and method lora without --format rounds nothing; "
            "give --format, or use qlora"
        )
    if config.solver is not None and SOLVERS[config.solver].needs_model:
        problems.append(
            "--init loftq rounds each weight several times while it is read, and --solver "
            f"{config.solver} needs the whole model; use rtn or hqq"
        )
    return problems


def as_plain(config: Any) -> dict[str, Any]:
    """Return a configuration as plain values, as they are written to YAML."""
    plain = dataclasses.asdict(config)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}
