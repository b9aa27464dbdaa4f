"""compressed-tensors folders, as llm-compressor and others write them.

A layer is weight_packed (integers in 32-bit words, or 4 and 6-bit floats in bytes) or weight (int8
or float8), with weight_scale; `compressed_layers` has the layouts. config.json describes groups of
layers; each layer's tensors must be those of one of them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from graft.convert.base import Reader
from graft.convert.folder import ForeignFolder, plain_tensors
from graft.convert.grids.compressed_layers import PARTS, Layer, Scheme
from graft.convert.grids.integers import Rounding
from graft.convert.labels.settings import rounds_inputs, runtime_tensors, unread, untargeted
from graft.convert.source import Source
from graft.errors import GraftError, raise_problems
from graft.text import quoted

_TOOL = "compressed-tensors"
_KNOWN = {
    *("quant_method", "config_groups", "format", "quantization_status", "ignore", "version"),
    *("kv_cache_scheme", "global_compression_ratio", "sparsity_config", "transform_config"),
    *("dequantize", "run_compressed", "use_optimized_inference", "moe_sparsity_config"),
}
_SPARSE = (".bitmask", ".compressed", ".meta")


class CompressedTensorsReader(Reader):
    """Folders of compressed-tensors."""

    quant_method = _TOOL

    def open_folder(self, folder: ForeignFolder) -> Source:
        """Return what is in the folder; raises GraftError for sparse and rotated weights."""
        settings = folder.settings
        _check(folder, settings)
        said = _schemes(folder, settings)
        schemes = said or [Scheme({}, None)]
        files, rounding = folder.weights(), Rounding()
        if any(key.endswith(_SPARSE) for key in files):
            raise GraftError(f"{folder.folder}: its weights are stored sparse; {_WAY_OUT}")
        packed = [key.removesuffix("_packed") for key in files if key.endswith(".weight_packed")]
        scaled = [
            key.removesuffix("_scale")
            for key in files
            if key.endswith(".weight_scale") and key.removesuffix("_scale") in files
        ]
        names = [key.removesuffix(".weight") for key in (*packed, *scaled)]
        parts = [f"{name}.{part}" for name in names for part in PARTS]
        return Source(
            kind=f"{_TOOL} ({settings.get('format', 'dense')})",
            model=folder.skeleton(len(files)),
            layers={
                name: partial(
                    Layer(files, name, folder.asked, rounding).read, schemes, settings.get("format")
                )
                for name in names
            },
            tensors=plain_tensors(files, (*parts, *runtime_tensors(files))),
            rounding=rounding,
            notes=_notes(settings)
            + unread(folder, _KNOWN)
            + ([] if said and not untargeted(_targets(settings), names) else [_BY_TENSORS]),
        )


_BY_TENSORS = "config_groups does not mean all weights: they are read as their tensors show"
_WAY_OUT = (
    "load it with Transformers and compressed-tensors, decompress and save it, or start from the "
    "unquantised model"
)


def _check(folder: ForeignFolder, settings: dict[str, Any]) -> None:
    """Raise GraftError for what changes the weights beyond their grid."""
    problems = []
    sparsity = settings.get("sparsity_config") or {}
    stored = sparsity.get("format", "dense") if isinstance(sparsity, dict) else sparsity
    if stored != "dense":
        problems.append(f"sparsity_config has the format {quoted(stored)}; {_WAY_OUT}")
    if str(settings.get("format")) in ("marlin-24", "sparse-24-bitmask", "sparse-bitmask"):
        problems.append(f"its format is {settings['format']!r}, which is sparse; {_WAY_OUT}")
    if settings.get("transform_config"):
        problems.append(
            "transform_config rotates weights and inputs when the model is loaded; start from the "
            "unquantised model"
        )
    raise_problems(problems, str(folder.folder))


def _schemes(folder: ForeignFolder, settings: dict[str, Any]) -> list[Scheme]:
    """Return the weights' part of each group; that of a preset's name says nothing of itself."""
    groups = settings.get("config_groups") or {}
    if not isinstance(groups, dict):
        raise GraftError(f"{folder.folder}: config_groups is {quoted(groups)}; expected groups")
    found = []
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else {}
        if weights is None:
            continue
        if not isinstance(weights, dict):
            raise GraftError(f"{folder.folder}: the weights of {quoted(name)} are no settings")
        own = group.get("format") if isinstance(group, dict) else None
        found.append(Scheme(weights, own))
    return found


def _targets(settings: dict[str, Any]) -> list[str]:
    groups = settings["config_groups"].values()
    stated = [group.get("targets") for group in groups if isinstance(group, dict)]
    return [
        target
        for targets in stated
        if isinstance(targets, list)
        for target in targets
        if isinstance(target, str)
    ]


def _notes(settings: dict[str, Any]) -> list[str]:
    groups = (settings.get("config_groups") or {}).values()
    rounded = ("input_activations", "output_activations")
    inputs = any(isinstance(group, dict) and any(map(group.get, rounded)) for group in groups)
    notes = [rounds_inputs(f"the runtime of {_TOOL}")] if inputs else []
    if settings.get("kv_cache_scheme"):
        notes.append(rounds_inputs(f"the runtime of {_TOOL}", "its cache of keys and values"))
    return notes


COMPRESSED_TENSORS = CompressedTensorsReader()
