"""From the settings of a run to the format that they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from graft.errors import GraftError, raise_problems
from graft.formats.config import WIDTHS, FormatConfig
from graft.formats.latent_grid import LatentGrid
from graft.formats.registry import AS_IT_IS, FORMATS, parse_format

_INT, _LATENT = "int", "latent"


def described(
    settings: FormatConfig,
    name: str,
    *,
    double_quant: bool = False,
    float32: bool = False,
    problems: Sequence[str] = (),
) -> dict[str, Any] | None:
    """Return {'format': name, options} with the defaults filled in; None for the dense format.

    double_quant: the default of that setting. float32: the weights are computed with as float32,
    and a latent format keeps them so. With bits auto it is the format that memory is planned for.
    Raises GraftError with the given problems and every setting that does not fit.
    """
    found = [*problems, *_problems(settings, name)]
    raise_problems(found, "format")
    if name == AS_IT_IS:
        return None
    taken = FORMATS[name].settings
    options: dict[str, Any] = {}
    if "group_size" in taken:
        options = {"bits": settings.bits or 4, "group_size": settings.group_size or 32}
    if options.get("bits") == "auto":
        # Until the layers are measured: the narrowest width that fills the budget.
        statistics = 32 / options["group_size"]
        enough = [width for width in WIDTHS if width + statistics >= (settings.budget or 0)]
        options["bits"] = (enough or WIDTHS[-1:])[0]
    if "double_quant" in taken:
        chosen = settings.double_quant
        options["double_quant"] = double_quant if chosen is None else chosen
    if "latent_dtype" in taken:
        options["dtype"] = latent_dtype(settings, options["bits"], float32)
    return {"format": name, **options}


def latent_described(settings: FormatConfig, float32: bool) -> dict[str, Any]:
    """Return the description of a latent format over the grid that the settings name: int, or ...

    Raises GraftError with every setting that does not fit, and for a format that is no such grid.
    """
    over_int = settings.format in (None, _LATENT, _INT)
    name = _LATENT if over_int else str(settings.format)
    if over_int:
        description = described(settings, name, float32=float32)
        assert description is not None
        return description
    description = described(replace(settings, latent_dtype=None), name)
    grid = None if description is None else parse_format(description)
    if not isinstance(grid, LatentGrid):
        raise GraftError(
            f"format: {name} is no grid that a weight is rounded to in training. Give --format "
            "int, nf4 or fp4, or train with qlora"
        )
    dtype = latent_dtype(settings, grid.bits, float32)
    return {"format": _LATENT, "grid": description, "dtype": dtype}


def latent_dtype(settings: FormatConfig, bits: int, float32: bool) -> str:
    """Return what a latent weight is kept in; bfloat16 has no more digits than 8-bit codes."""
    return settings.latent_dtype or ("float32" if float32 or bits == 8 else "bfloat16")


def taking(*options: str) -> str:
    """Return the formats that take all of some settings, in words."""
    names = [name for name in FORMATS if FORMATS[name].settings.keys() >= set(options)]
    several = f"{', '.join(names[:-1])} and {names[-1]} formats"
    return several if len(names) > 1 else f"{names[0]} format"


def _problems(settings: FormatConfig, name: str) -> list[str]:
    """Return every setting that means nothing to the format of that name."""
    unknown = FORMATS.problem(name)
    if unknown is not None:
        return [unknown]
    taken, problems = FORMATS[name].settings, []
    grouped = settings.bits is not None or settings.group_size is not None
    if grouped and "group_size" not in taken:
        formats = taking("bits", "group_size")
        problems.append(f"--bits and --group-size belong to the {formats}; the format is {name}")
    if (settings.bits == "auto") != (settings.budget is not None):
        problems.append("--bits auto and --budget belong together; give both or neither")
    if settings.bits == "auto" and "budget" not in taken:
        problems.append(
            f"--bits auto chooses widths of the {taking('budget')}; give {name} weights one width"
        )
    if settings.latent_dtype is not None and "latent_dtype" not in taken:
        formats = taking("latent_dtype")
        problems.append(f"--latent-dtype belongs to the {formats}; the format is {name}")
    elif settings.bits == 8 and settings.latent_dtype in ("bfloat16", "int8"):
        problems.append(
            f"--latent-dtype {settings.latent_dtype} has no more digits than 8-bit codes; drop it"
        )
    if settings.double_quant and "double_quant" not in taken:
        names = " and ".join(one for one in FORMATS if "double_quant" in FORMATS[one].settings)
        problems.append(f"--double-quant belongs to --format {names}; the format is {name}")
    return problems
