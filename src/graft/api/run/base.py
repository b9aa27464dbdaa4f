"""How a run's base is to be stored: quantised by the run, or as its folder holds it already."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from transformers import PreTrainedConfig

from graft.adapters.config import GRID_METHODS
from graft.api.config import (
    PlanConfig,
    TrainConfig,
    check_solver,
    chosen_solver,
    format_description,
)
from graft.errors import raise_problems
from graft.formats.base import WeightFormat
from graft.formats.int_group import IntGroupFormat
from graft.formats.registry import parse_format
from graft.model.folder import stored_formats
from graft.plan.skeleton import keeps_float32


def base_format(
    config: TrainConfig | PlanConfig, folder: Path, model_config: PreTrainedConfig
) -> WeightFormat | None:
    """Return the format that a run quantises its base to.

    None leaves it as it is: unquantised, or in the formats that a quantised folder has. Raises
    GraftError with every option that does not fit.
    """
    if stored_formats(folder):
        _check_stored(config, folder)
        return None
    float32 = keeps_float32(model_config, config.dtype)
    description = format_description(config, config.method, float32)
    check_solver(chosen_solver(config, config.method, config.bits), description)
    return None if description is None else parse_format(description)


def exported_formats(
    config: TrainConfig,
    folder: Path,
    weight_format: WeightFormat | None,
    targets: Collection[str],
) -> list[WeightFormat]:
    """Return the formats of the layers that are still quantised when a run is merged.

    A lora or qlora update makes the layers dense that it is merged into, and those with them that
    have no integers.
    """
    stored = stored_formats(folder) if weight_format is None else {}
    merges_exactly = config.method in GRID_METHODS
    kept = [
        chosen
        for name, chosen in stored.items()
        if merges_exactly or (name not in targets and isinstance(chosen, IntGroupFormat))
    ]
    if weight_format is not None and merges_exactly:
        kept.append(weight_format.deployed)
    return list(dict.fromkeys(kept))


def _check_stored(config: TrainConfig | PlanConfig, folder: Path) -> None:
    """Raise GraftError with every option that rounds weights, which a quantised folder has not."""
    rounding = ("format", "bits", "budget", "group_size", "double_quant", "latent_dtype", "solver")
    given = {name: getattr(config, name) for name in rounding}
    problems = [
        f"--{name.replace('_', '-')} says how to quantise, and this folder is quantised already; "
        "drop it, or start from the unquantised model"
        for name, value in given.items()
        if value is not None and value != "rtn"  # which a run's own settings say
    ]
    if config.method == "merge_aware" or config.init == "loftq":
        what = "method merge_aware" if config.method == "merge_aware" else "--init loftq"
        problems.append(
            f"{what} rounds the weights itself: start from the unquantised model, or train with "
            "qalora"
        )
    raise_problems(problems, str(folder))
