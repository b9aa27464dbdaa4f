"""In which format a run's base is to be stored, and which formats its merge leaves."""

from __future__ import annotations

from collections.abc import Collection

from graft.adapters.registry import method_of
from graft.adapters.starts.registry import STARTS
from graft.api.checks import check_solver, chosen_solver, default_solver, format_description
from graft.api.config import PlanConfig, TrainConfig
from graft.errors import raise_problems
from graft.formats.base import WeightFormat
from graft.formats.registry import parse_format
from graft.layers.activations import check_activations
from graft.model.subject import Subject
from graft.plan.skeleton import keeps_float32


def base_format(config: TrainConfig | PlanConfig, subject: Subject) -> WeightFormat | None:
    """Return the format that a run quantises its base to.

    None leaves it as it is: unquantised, or in the formats that a quantised folder has. Raises
    GraftError with every option that does not fit.
    """
    if subject.formats:
        _check_stored(config, subject)
        check_activations(config.activations, subject.formats.values())
        return None
    float32 = keeps_float32(subject.config, config.dtype)
    description = format_description(config, config.method, float32)
    check_solver(chosen_solver(config, config.method, config.bits), description)
    if description is None:
        check_activations(config.activations, ())
        return None
    weight_format = parse_format(description)
    check_activations(config.activations, [weight_format.deployed])
    raise_problems(method_of(config).grid_problems(config, weight_format), "configuration")
    return weight_format


def exported_formats(
    config: TrainConfig,
    subject: Subject,
    weight_format: WeightFormat | None,
    targets: Collection[str],
) -> list[WeightFormat]:
    """Return the formats of the layers that are still quantised when a run is merged.

    An update that no grid absorbs makes the layers dense that it is merged into, and those with
    them that other programs' files do not hold. Low-rank factors are exported as their products,
    which are dense.
    """
    factored = {name for name in (*targets, *subject.formats) if _is_factor(name, subject)}
    stored = subject.formats if weight_format is None else {}
    merges_exactly = method_of(config).merges_exactly
    kept = [
        chosen
        for name, chosen in stored.items()
        if name not in factored and (merges_exactly or (name not in targets and chosen.portable))
    ]
    if weight_format is not None and merges_exactly and not factored.issuperset(targets):
        kept.append(weight_format.deployed)
    return list(dict.fromkeys(kept))


def _is_factor(name: str, subject: Subject) -> bool:
    return name.rpartition(".")[0] in subject.factors


def _check_stored(config: TrainConfig | PlanConfig, subject: Subject) -> None:
    """Raise GraftError with every option that rounds weights, which a quantised folder has not."""
    rounding = ("format", "bits", "budget", "group_size", "double_quant", "latent_dtype", "solver")
    given = {name: getattr(config, name) for name in rounding}
    problems = [
        f"--{name.replace('_', '-')} says how to quantise, and this folder is quantised already; "
        "drop it, or start from the unquantised model"
        for name, value in given.items()
        if value is not None and value != default_solver(None)  # which a run's own settings say
    ]
    words = [f"method {config.method}"] if method_of(config).rounds_itself else []
    words += [f"--init {config.init}"] if STARTS[config.init].changes_base else []
    problems += [
        f"{what} rounds the weights itself: start from the unquantised model, or train with qalora"
        for what in words[:1]
    ]
    raise_problems(problems, str(subject.folder))
