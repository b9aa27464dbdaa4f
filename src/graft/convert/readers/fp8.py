"""FP8 folders: 8-bit floats with a scale for the tensor, for each row, or for each block.

A layer holds weight float8 [out_features, in_features] and its scales, under the names below; what
is called an inverse is multiplied like the others: w = weight scale. DeepSeek and Transformers have
blocks of weight_block_size, of which the last ones are short; fbgemm a scale for each row; AutoFP8
one for the tensor; MXFP8 one for 32 neighbours, E8M0 in bytes. Experts may be E2M1, two to a byte.
Weights that were only cast to 8 bits have no scales, and config.json no word of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from graft.convert.base import Reader
from graft.convert.folder import FLOATS, ForeignFolder, plain_tensors
from graft.convert.grids.floats import EXPONENTS, FP8, block_of, e2m1, scale_of, scaled
from graft.convert.labels.settings import rounds_inputs, runtime_tensors, unread
from graft.convert.source import DenseLayer, PlainTensor, ReadLayer, Source
from graft.errors import GraftError, raise_problems
from graft.model.weight_files import WeightFiles

_METHODS = ("fp8", "fbgemm_fp8", "mxfp8")
_KNOWN = {
    *("quant_method", "activation_scheme", "weight_block_size", "dequantize", "ignored_layers"),
    *("modules_to_not_convert", "modules_to_convert", "scale_fmt", "expert_dtype", "fmt"),
    *("activation_scale_ub", "kv_cache_scheme", "ignore"),
}
_BEHIND_TENSOR = ("_scale_inv", "_scale")
_BEHIND_LAYER = (".scale", ".qscale_weight", ".scale_weight")
"""What follows the name of a tensor, or of its layer, where its scales are."""
SETTINGS_OF_MODELOPT = "hf_quant_config.json"
"""Where older releases of ModelOpt keep their settings; config.json then says nothing of them."""
_PACKED = (torch.int8, torch.uint8)


class Fp8Reader(Reader):
    """Folders of DeepSeek's kind, of fbgemm, AutoFP8 and MXFP8, and weights that were only cast."""

    def reads_folder(self, folder: ForeignFolder) -> bool:
        """Return whether the settings say so, or there are none and a tensor has 8-bit floats."""
        if folder.settings:
            return folder.settings.get("quant_method") in _METHODS and not folder.is_pickled
        stored = any(folder.folder.glob("*.safetensors"))
        if not stored or (folder.folder / SETTINGS_OF_MODELOPT).is_file():
            return False
        files = folder.files()
        return any(files.dtype(key) in FP8 for key in files)

    def open_folder(self, folder: ForeignFolder) -> Source:
        """Return what is in the folder; raises GraftError where a scale is missing."""
        return fp8_source(folder, str(folder.settings.get("quant_method") or "FP8"), _KNOWN)


def fp8_source(folder: ForeignFolder, tool: str, known: set[str]) -> Source:
    """Return what is in a folder of 8-bit floats, with the settings' names that its tool has.

    Raises GraftError where a scale is missing.
    """
    files = folder.weights()
    quantised = {key: scales_of(files, key) for key in files if _is_quantised(files, key)}
    notes = _check_scales(folder, files, quantised)
    block = _stated_block(folder)
    layers: dict[str, ReadLayer] = {}
    tensors: dict[str, PlainTensor] = {}
    for key, scales in quantised.items():
        if key.endswith(".weight") and len(files.shape(key)) == 2:
            layers[key.removesuffix(".weight")] = partial(fp8_layer, files, key, scales, block)
        else:
            make = partial(_stacked, files, key, scales, block)
            tensors[key] = PlainTensor(files.shape(key), torch.float32, make, "FP8")
    runtime = runtime_tensors(files)
    parts = {*quantised, *(key for key in quantised.values() if key), *runtime}
    if folder.settings:
        notes += [rounds_inputs(f"the runtime of {tool}")] if quantised else []
        notes += unread(folder, known)
    return Source(
        kind="FP8",
        model=folder.skeleton(len(files)),
        layers=layers,
        tensors=plain_tensors(files, parts) | tensors,
        notes=notes,
    )


def _is_quantised(files: WeightFiles, key: str) -> bool:
    """Return whether a tensor is of 8-bit floats, or of packed 4-bit floats with a scale."""
    if files.dtype(key) in FP8:
        return True
    packed = files.dtype(key) in _PACKED and key.endswith(".weight")
    return packed and scales_of(files, key) is not None


def scales_of(files: WeightFiles, key: str) -> str | None:
    """Return the name of a tensor's scales; raises GraftError where there are two."""
    layer = key.removesuffix(".weight")
    names = [key + part for part in _BEHIND_TENSOR]
    names += [layer + part for part in _BEHIND_LAYER if layer != key]
    found = [name for name in names if name in files]
    if len(found) > 1:
        raise GraftError(f"{key} has {' and '.join(found)}; expected one of them")
    return found[0] if found else None


def _check_scales(
    folder: ForeignFolder, files: WeightFiles, quantised: dict[str, str | None]
) -> list[str]:
    """Return the note for weights without scales; raises GraftError where they should have them."""
    bare = [key for key, scales in quantised.items() if scales is None]
    others = [key for key in files if "scale" in key.rpartition(".")[2]]
    if folder.settings or others:
        problems = [f"tensor {key}_scale (or _scale_inv) is missing" for key in bare]
        raise_problems(problems[:20], str(folder.folder))
    if not bare:
        return []
    return [
        f"{len(bare)} tensors of 8-bit floats have no scales, and config.json says nothing of them "
        f"({bare[0]} ...): their values are taken as they are"
    ]


def _stated_block(folder: ForeignFolder) -> list[tuple[int, int]]:
    """Return the block of the settings; Transformers' own where they are its and name none."""
    usual = [128, 128] if folder.settings.get("quant_method") == "fp8" else None
    stated = folder.settings.get("weight_block_size", usual)
    if stated is None:
        return []
    whole = isinstance(stated, list) and all(type(size) is int and size > 0 for size in stated)
    if not whole or len(stated) != 2:
        raise GraftError(
            f"{folder.folder}: weight_block_size is {stated!r:.100}; expected two sizes, such as "
            "[128, 128]"
        )
    return [(stated[0], stated[1])]


def fp8_layer(
    files: WeightFiles,
    key: str,
    scales: str | None,
    stated: Sequence[tuple[int, int]],
    out_features: int,
    in_features: int,
) -> DenseLayer:
    """Return a weight of 8-bit floats, or of 4-bit ones two to a byte, times its scales.

    stated: the block of the settings, if any, whose last ones may be short. Raises GraftError
    where the parts do not fit.
    """
    dtype, shape = files.dtype(key), (out_features, in_features)
    packed = dtype in _PACKED
    expected = (out_features, in_features // 2) if packed else shape
    if files.shape(key) != expected:
        raise GraftError(f"{key} has shape {list(files.shape(key))}; expected {list(expected)}")
    block = shape
    if scales is not None:
        _check_scale_dtype(files, scales)
        block = block_of(key, files.shape(scales), shape, () if packed else stated)

    def make() -> Tensor:
        stored = files.read_once(key)
        values = e2m1(stored) if packed else stored.float()
        if scales is None:
            return values
        grid = _grid(scale_of(files.read_once(scales)), shape, block)
        return scaled(values, grid, block)

    return DenseLayer("FP4 (E2M1)" if packed else "FP8", make)


def _grid(scales: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """Return scales of any shape as [rows, columns] of blocks."""
    return scales.reshape(-(-shape[0] // block[0]), -(-shape[1] // block[1]))


def _check_scale_dtype(files: WeightFiles, key: str) -> None:
    if files.dtype(key) not in (*FLOATS, *EXPONENTS, *FP8):
        raise GraftError(f"{key} is {files.dtype(key)}; expected floats or exponents")


def _stacked(
    files: WeightFiles, key: str, scales: str | None, stated: Sequence[tuple[int, int]]
) -> Tensor:
    """Return fused experts [experts, rows, columns], or any tensor that was only cast."""
    values = files.read_once(key).float()
    if scales is None:
        return values
    factors = scale_of(files.read_once(scales))
    if factors.dim() != values.dim() or values.dim() != 3 or len(factors) != len(values):
        raise GraftError(
            f"{key} has scales {list(factors.shape)} for {list(values.shape)}, which do not fit"
        )
    shape = values.shape[1], values.shape[2]
    block = block_of(key, tuple(factors.shape[1:]), shape, stated)
    return torch.stack([scaled(*pair, block) for pair in zip(values, factors, strict=True)])


FP8_FOLDERS = Fp8Reader()
