"""Folders of NVIDIA's ModelOpt: FP8 and NVFP4.

Its settings are in config.json, or in hf_quant_config.json beside it. A layer holds

- FP8: weight float8 E4M3 [out, in], weight_scale one or [out]: w = weight scale;
- NVFP4: weight uint8 [out, in / 2], E2M1 two to a byte, weight_scale E4M3 [out, in / 16] and
  weight_scale_2, one number: w = weight scale scale_2.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from graft.convert.base import Reader
from graft.convert.folder import ForeignFolder, check_parts, plain_tensors
from graft.convert.grids.floats import FP8, e2m1, overall_scale, scaled
from graft.convert.labels.settings import rounds_inputs, runtime_tensors, unread
from graft.convert.readers.fp8 import SETTINGS_OF_MODELOPT, fp8_layer
from graft.convert.source import DenseLayer, Source
from graft.errors import GraftError
from graft.files.read import read_json
from graft.model.weight_files import WeightFiles
from graft.text import listed, quoted

_ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "MIXED_PRECISION")
_KNOWN = {
    *("quant_method", "quant_algo", "kv_cache_quant_algo", "exclude_modules", "ignore", "producer"),
    *("group_size", "config_groups", "quantized_layers", "kv_cache_scheme"),
}
_BLOCK = 16
_PARTS = ("weight", "weight_scale", "weight_scale_2")


class ModelOptReader(Reader):
    """Folders of ModelOpt."""

    quant_method = "modelopt"

    def reads_folder(self, folder: ForeignFolder) -> bool:
        """Return whether the settings say so, or are in ModelOpt's own file."""
        return super().reads_folder(folder) or (not folder.settings and _has_own_file(folder))

    def open_folder(self, folder: ForeignFolder) -> Source:
        """Return what is in the folder; raises GraftError for algorithms other than the above."""
        if not folder.settings:
            stated = read_json(folder.folder / SETTINGS_OF_MODELOPT).get("quantization")
            own = {"quantization_config": stated if isinstance(stated, dict) else {}}
            folder = replace(folder, config=folder.config | own)
        algorithm = folder.settings.get("quant_algo")
        files = folder.weights()
        smoothed = [key for key in files if key.endswith(".pre_quant_scale")]
        if algorithm not in _ALGORITHMS or smoothed:
            found = "pre_quant_scale" if smoothed else quoted(algorithm)
            raise GraftError(
                f"{folder.folder}: ModelOpt's quant_algo is {quoted(algorithm)}, with {found}; "
                f"graft reads {listed(_ALGORITHMS)}: start from the unquantised model"
            )
        names = [
            key.removesuffix(".weight")
            for key in files
            if key.endswith(".weight") and files.dtype(key) in (*FP8, torch.uint8)
        ]
        parts = [f"{name}.{part}" for name in names for part in _PARTS]
        notes = unread(folder, _KNOWN)
        return Source(
            kind=f"ModelOpt ({algorithm})",
            model=folder.skeleton(len(files)),
            layers={name: partial(_layer, files, name) for name in names},
            tensors=plain_tensors(files, (*parts, *runtime_tensors(files))),
            notes=[*notes, rounds_inputs("ModelOpt's runtime")] if names else notes,
        )


def _has_own_file(folder: ForeignFolder) -> bool:
    return (folder.folder / SETTINGS_OF_MODELOPT).is_file() and not folder.is_pickled


def _layer(files: WeightFiles, name: str, out_features: int, in_features: int) -> DenseLayer:
    key, scale, overall = (f"{name}.{part}" for part in _PARTS)
    if scale not in files:
        raise GraftError(f"tensor {scale} is missing")
    if files.dtype(key) in FP8:
        if overall in files:
            raise GraftError(f"{overall} lies beside 8-bit floats; expected none")
        return fp8_layer(files, key, scale, (), out_features, in_features)
    blocks = (out_features, in_features // _BLOCK)
    expected = {
        "weight": ((out_features, in_features // 2), (torch.uint8,)),
        "weight_scale": (blocks, (torch.float8_e4m3fn,)),
    }
    check_parts(files, name, expected)
    if overall not in files or in_features % _BLOCK:
        raise GraftError(f"{name} is not NVFP4 as ModelOpt has it: expected {overall}, one float")

    def make() -> Tensor:
        factors = files.read_once(scale).float() * overall_scale(files, overall)
        return scaled(e2m1(files.read_once(key)), factors, (1, _BLOCK))

    return DenseLayer("NVFP4", make)


MODELOPT = ModelOptReader()
