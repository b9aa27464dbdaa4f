"""What can be known of a run's settings to be wrong, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from graft.adapters.config import AdapterConfig
from graft.adapters.method import Method
from graft.adapters.registry import METHODS, method_of, refusal
from graft.adapters.starts.registry import STARTS
from graft.api.config import PlanConfig, TrainConfig
from graft.calibrate.config import SolverConfig
from graft.calibrate.registry import SOLVERS
from graft.entries import Entries
from graft.errors import raise_problems
from graft.export.registry import TARGETS
from graft.files.bounds import bound
from graft.formats.choice import described
from graft.formats.config import FormatConfig
from graft.formats.registry import AS_IT_IS, FORMATS, make_format
from graft.objectives.config import ObjectiveConfig
from graft.objectives.registry import OBJECTIVES
from graft.optimizers.registry import OPTIMIZERS
from graft.train.trackers import TRACKERS


def format_description(
    config: FormatConfig, method: str | None, float32: bool = False
) -> dict[str, Any] | None:
    """Return {'format': ..., options}, with the method's defaults filled in; None for dense.

    float32: the weights are computed with as float32. With bits auto it is the format that memory
    is planned for. Raises GraftError with every option that does not fit.
    """
    if method is None:
        return described(config, config.format or AS_IT_IS, float32=float32)
    return METHODS[method].weight_format(config, float32)


def chosen_solver(
    config: SolverConfig, method: str | None = None, bits: int | str | None = None
) -> str:
    """Return the solver, with the default of the method on codes of `bits` filled in."""
    return config.solver or default_solver(method, bits)


def default_solver(method: str | None, bits: int | str | None = None) -> str:
    """Return the solver of a method's base."""
    return "rtn" if method is None else METHODS[method].default_solver(bits)


def calibrating_rows(config: TrainConfig | PlanConfig) -> int:
    """Return on how many rows a run's weights are rounded; 0 where nothing needs any.

    bits auto measures the layers of the dense model, and a start that moves a part of the weights
    by their inputs looks at that model too.
    """
    solver = SOLVERS[chosen_solver(config, config.method, config.bits)]
    later = method_of(config).rounds_in_training(config)
    start = STARTS[config.init]
    moves = start.reads_inputs and start.changes_base
    needed = solver.needs_text or later or moves or config.bits == "auto"
    return config.calibration_rows if needed else 0


def looking_rows(config: TrainConfig | PlanConfig) -> int:
    """Return on how many rows a start looks at the base as it trains."""
    start = STARTS[config.init]
    looks = start.reads_inputs and not start.changes_base
    return config.calibration_rows if looks else 0


def check_solver(solver: str, description: dict[str, Any] | None) -> None:
    """Raise GraftError when a solver cannot round to the format of that description."""
    # What a format offers a solver does not depend on its options, which may be wrong themselves.
    weight_format = None if description is None else make_format(description["format"])
    problem = SOLVERS[solver].problem(weight_format)
    raise_problems([] if problem is None else [problem], f"--solver {solver}")


def check_train_config(config: TrainConfig) -> None:
    """Raise GraftError with everything in the configuration that cannot work."""
    problems = _unknown_names(config)
    raise_problems(problems, "configuration")
    problems = _bad_numbers(config) + _no_numbers(config)
    if config.steps is not None and config.epochs is not None:
        problems.append("--steps and --epochs are both given; give one of them")
    problems += _watching_problems(config)
    method = method_of(config)
    problems += _refused_options(config, method)
    problems += _objective_problems(config)
    problems += method.problems(config)
    problems += _rounding_problems(config, method)
    problems += STARTS[config.init].problems(
        config,
        low_rank=method.low_rank,
        adds_low_rank=method.adds_low_rank,
        quantises=(config.format or method.default_format) != AS_IT_IS,
        solver=config.solver if _needs_model(config.solver) else None,
    )
    problems += [
        f"--export {name}: {problem}"
        for name in config.export
        for problem in TARGETS[name].adapter_problems(config)
    ]
    raise_problems(problems, "configuration")


def _unknown_names(config: TrainConfig) -> list[str]:
    """Return every name that no table has: a configuration made in Python may hold any."""
    named: list[tuple[Entries[Any], str | None]] = [
        (METHODS, config.method),
        (STARTS, config.init),
        (SOLVERS, config.solver),
        (OBJECTIVES, config.objective),
        (OPTIMIZERS, config.optimizer),
        *((TARGETS, name) for name in config.export),
        *((TRACKERS, name) for name in config.track),
    ]
    found = (table.problem(name) for table, name in named if name is not None)
    return [problem for problem in found if problem is not None]


_LARGE = 2**31
"""What no size and no count reaches."""


def check_plan_config(config: PlanConfig) -> None:
    """Raise GraftError with every number that no training could have."""
    unknown = OBJECTIVES.problem(config.objective)
    raise_problems([] if unknown is None else [unknown], "configuration")
    problems = _not_positive(config, ("rank", "batch_size", "max_length", "alpha"))
    problems += _objective_problems(config)
    raise_problems(problems + _no_numbers(config), "configuration")


def _no_numbers(config: TrainConfig | PlanConfig) -> list[str]:
    """Return every whole number that is no size of a tensor, and every other that is none."""
    values = {one.name: getattr(config, one.name) for one in fields(config)}
    problems = [
        f"--{name.replace('_', '-')} is {value:,}; expected less than {_LARGE:,}"
        for name, value in values.items()
        if type(value) is int and abs(value) >= _LARGE
    ]
    return problems + [
        f"--{name.replace('_', '-')} is {value}; expected a number that is finite"
        for name, value in values.items()
        if type(value) is float
        and not (math.isfinite(value) or (value > 0 and name in _MAY_BE_ENDLESS))
    ]


_MAY_BE_ENDLESS = ("max_grad_norm", "save_minutes")
"""Of which infinity means never."""


def _not_positive(config: TrainConfig | PlanConfig, names: Sequence[str]) -> list[str]:
    values = {name: getattr(config, name) for name in names}
    return [
        f"--{name.replace('_', '-')} is {value}; expected more than 0"
        for name, value in values.items()
        if value is not None and value <= 0
    ]


_MOST_BATCHES = 1_000_000
"""Of one step, whose rows are drawn before it begins."""


def _bad_numbers(config: TrainConfig) -> list[str]:
    positive = (
        *("rank", "batch_size", "grad_accum", "steps", "epochs", "learning_rate", "alpha"),
        *("loftq_rounds", "svd_steps", "max_grad_norm", "eval_every", "eval_epochs", "save_every"),
        *("save_minutes", "patience", "calibration_rows"),
    )
    problems = _not_positive(config, positive)
    if config.grid_rank is not None and config.grid_rank < 0:
        problems.append(f"--grid-rank is {config.grid_rank}; expected 0 or more")
    not_negative = {
        "min-improvement": config.min_improvement,
        "weight-decay": config.weight_decay,
        "damping": config.damping,
        "samples": config.samples,
    }
    problems += [
        f"--{name} is {value}; expected 0 or more"
        for name, value in not_negative.items()
        if value < 0
    ]
    if config.grad_accum > bound(_MOST_BATCHES):
        problems.append(
            f"--grad-accum is {config.grad_accum:,}; expected at most {bound(_MOST_BATCHES):,}"
        )
    shares = {
        "dropout": config.dropout,
        "warmup-fraction": config.warmup_fraction,
        "dense-fraction": config.dense_fraction or 0.0,
    }
    return problems + [
        f"--{name} is {share}; expected 0 up to, but not including, 1"
        for name, share in shares.items()
        if share < 0 or share >= 1
    ]


def _watching_problems(config: TrainConfig) -> list[str]:
    """Return what hinders in how a run is evaluated and watched."""
    problems = []
    if config.eval_every is not None and config.eval_epochs is not None:
        problems.append("--eval-every and --eval-epochs are both given; give one of them")
    if config.patience is not None and config.eval_every is None and config.eval_epochs is None:
        problems.append(
            f"--patience {config.patience}: nothing is evaluated between the first step and the "
            "last; give --eval-every or --eval-epochs too"
        )
    needed = {name: TRACKERS[name].missing() for name in config.track}
    return problems + [f"--track {name}: {what}" for name, what in needed.items() if what]


def _refused_options(config: TrainConfig, method: Method) -> list[str]:
    """Return why the method has no use for options that were given."""
    given = [one.name for one in fields(AdapterConfig) if getattr(config, one.name) != one.default]
    return [found for option in given if (found := refusal(method, option)) is not None]


def _objective_problems(config: TrainConfig | PlanConfig) -> list[str]:
    """Return why the objective has no use for options that were given, and which cannot be."""
    objective = OBJECTIVES[config.objective]
    problems = []
    for option in fields(ObjectiveConfig):
        takers = [name for name in OBJECTIVES if option.name in OBJECTIVES[name].options]
        given = getattr(config, option.name) != option.default
        if given and takers and option.name not in objective.options:
            flag = option.name.replace("_", "-")
            problems.append(
                f"--{flag} belongs to {' and '.join(takers)}, not to --objective "
                f"{config.objective}; drop it"
            )
    if config.teacher_format is not None:
        problem = FORMATS.problem(config.teacher_format)
        problems += [] if problem is None else [f"--teacher-format: {problem}"]
    return problems + objective.problems(config)


def _rounding_problems(config: TrainConfig, method: Method) -> list[str]:
    """Return why a solver cannot round between two steps, which needs text."""
    later = method.rounds_in_training(config)
    if not later or config.solver is None or SOLVERS[config.solver].needs_text:
        return []
    calibrated = " or ".join(name for name in SOLVERS if SOLVERS[name].needs_text)
    return [
        f"--solver {config.solver}: {method.name} rounds in mid-training, by {calibrated}; give "
        "one of them, or --dense-fraction 0 to round before training"
    ]


def _needs_model(solver: str | None) -> bool:
    return solver is not None and SOLVERS[solver].needs_model
