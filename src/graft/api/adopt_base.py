"""The base that an adapter belongs to: found, opened, and what hinders it, with the ways out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from graft.errors import GraftError
from graft.files.read import read_json
from graft.formats.base import WeightFormat
from graft.formats.dense import DenseFormat
from graft.model.folder import CONFIG_FILE, CONFIG_MARKER, find_folder
from graft.model.subject import Subject, open_subject
from graft.model.targets import select_targets
from graft.plan.skeleton import freeze_on_meta
from graft.text import quoted

_PATH = re.compile(r"[/~.\\]|[A-Za-z]:[\\/]|.*[/\\].*[/\\]|.*\\")
"""What is a path of some machine, and no hub id."""


def open_base(name: str, named_by: Path | None, trust_remote_code: bool) -> Subject:
    """Open the base of an adapter.

    named_by: the adapter's folder, where it was that which named the base. Raises GraftError when
    the base is not here, or is quantised by another tool.
    """
    if named_by is not None and not Path(name).is_dir() and _PATH.match(name):
        raise GraftError(
            f"the adapter {named_by} names its base as {quoted(name)}, a folder of the machine "
            "that it was trained on, which is not here; give the base with --model (a folder or a "
            "hub id)"
        )
    try:
        folder = find_folder(name, config_alone=True)
        _check_unquantised(name, read_json(folder / CONFIG_FILE))
        return open_subject(name, trust_remote_code)
    except GraftError as error:
        if named_by is None or Path(name).is_dir():
            raise
        raise GraftError(
            f"{error}\nthe adapter {named_by} names that base; another can be given with --model"
        ) from error


def _check_unquantised(name: str, config: Mapping[str, Any]) -> None:
    """Raise GraftError with the ways to go, for a base that another tool quantised."""
    found = config.get("quantization_config", config.get("quantization"))
    if not isinstance(found, dict) or found == CONFIG_MARKER:
        return
    method = found.get("quant_method")
    words = (
        f"the adapter's base {name} is quantised by another tool ({method or 'MLX'}). Two ways: "
        f"on these very weights: graft convert {name} --out NEW_FOLDER, then adopt with "
        "--model NEW_FOLDER. "
    )
    if _is_bitsandbytes(found):
        raise GraftError(
            f"{words}Or, on the unquantised model that it was made of, rounded again in the same "
            f"way: --model ORIGINAL {_rounding(found)}; a merge --into original then has the "
            "16-bit weights too"
        )
    raise GraftError(
        f"{words}Or, on the unquantised model that it was made of, whose weights are not quite "
        "those that the adapter was trained beside: --model ORIGINAL"
    )


def _is_bitsandbytes(found: Mapping[str, Any]) -> bool:
    return found.get("quant_method") == "bitsandbytes" or "bnb_4bit_quant_type" in found


def _rounding(found: Mapping[str, Any]) -> str:
    """Return the flags that round as bitsandbytes did."""
    if found.get("load_in_8bit") or found.get("_load_in_8bit"):
        return "--format int8"
    kind = "nf4" if found.get("bnb_4bit_quant_type") == "nf4" else "fp4"
    return f"--format {kind}" + " --double-quant" * bool(found.get("bnb_4bit_use_double_quant"))


def base_skeleton(subject: Subject, weight_format: WeightFormat | None) -> PreTrainedModel:
    """Return the base without data, its linear layers frozen as they will be."""
    if subject.formats and weight_format is not None:
        raise GraftError(
            f"{subject.folder} is quantised already; drop --format, or give its dense base"
        )
    skeleton = subject.new_model()
    names = select_targets(skeleton, ())
    freeze_on_meta(skeleton, dict.fromkeys(names, weight_format or DenseFormat()) | subject.formats)
    return skeleton
