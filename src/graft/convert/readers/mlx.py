"""MLX folders, as mlx-lm writes them: affine quantisation, and small floats.

A module holds weight uint32 [rows, columns * bits / 32], a row being one stream of bits with the
first code lowest, and in mode

- affine: scales and biases float [rows, groups]: w = scale q + bias, which is the int format;
- mxfp4, mxfp8: scales uint8 [rows, groups], E8M0, for 32 numbers E2M1 or E4M3;
- nvfp4: scales uint8 [rows, groups], E4M3, for 16 numbers E2M1.

Embeddings are quantised too, and are dequantised here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from graft.convert.base import Reader
from graft.convert.config import ConvertConfig
from graft.convert.folder import FLOATS, WORDS, ForeignFolder, check_parts, plain_tensors, size
from graft.convert.grids.affine import Grid, affine_layer, neighbours, unpack_stream
from graft.convert.grids.floats import e2m1, powers, scaled
from graft.convert.grids.integers import Rounding
from graft.convert.labels.settings import rounds_inputs
from graft.convert.source import DenseLayer, QuantisedLayer, Source
from graft.errors import GraftError
from graft.model.families import FAMILIES
from graft.model.weight_files import WeightFiles
from graft.text import quoted

_PARTS = ("weight", "scales", "biases")
_MODES = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}
"""The mode of bytes as scales, by the bits of a number and the numbers of a group."""


class MlxReader(Reader):
    """Folders of mlx-lm."""

    def reads_folder(self, folder: ForeignFolder) -> bool:
        """Return whether the settings have a group size and name no method."""
        settings = folder.settings
        is_mlx = settings.get("quant_method") is None and "group_size" in settings
        return is_mlx and not folder.is_pickled

    def open_folder(self, folder: ForeignFolder) -> Source:
        """Return what is in an MLX folder; raises GraftError for a model that mlx-lm rearranges."""
        settings, model_type = folder.settings, folder.config.get("model_type")
        known = [name for name, family in FAMILIES.items() if family.in_mlx]
        if model_type not in known:
            raise GraftError(
                f"{folder.folder}: model_type is {model_type!r}; graft reads MLX folders of "
                f"{', '.join(known)}, whose weights mlx-lm takes unchanged"
            )
        files, rounding = folder.weights(), Rounding()
        names = [key.removesuffix(".scales") for key in files if key.endswith(".scales")]
        rounds = bool(folder.config.get("quantize_activations"))
        return Source(
            kind="MLX",
            model=folder.skeleton(len(files)),
            layers={
                name: partial(_layer, files, name, settings, folder.asked, rounding)
                for name in names
            },
            tensors=plain_tensors(files, (f"{name}.{part}" for name in names for part in _PARTS)),
            rounding=rounding,
            notes=[rounds_inputs("mlx-lm")] if rounds else [],
        )


def _layer(
    files: WeightFiles,
    name: str,
    settings: dict[str, Any],
    asked: ConvertConfig,
    rounding: Rounding,
    out_features: int,
    in_features: int,
) -> QuantisedLayer | DenseLayer:
    weight, scales = f"{name}.weight", f"{name}.scales"
    words, groups = size(files, weight, 1), size(files, scales, 1)
    bits = words * 32 // in_features
    if words * 32 != in_features * bits or not 1 <= bits <= 8:
        raise GraftError(
            f"{weight} holds {in_features} codes in {words} 32-bit words, "
            f"{words * 32 / in_features:g} bits each; MLX's have 1 to 8"
        )
    if in_features % groups:
        raise GraftError(
            f"{name} has {groups} groups of its {in_features} inputs, which are not equal parts; "
            "the folder is damaged: convert it again with mlx_lm"
        )
    group_size = in_features // groups
    mode = "affine"
    if files.dtype(scales) == torch.uint8:
        mode = _MODES.get((bits, group_size), f"of {bits} bits in groups of {group_size}")
    _check_stated(name, settings, {"mode": mode, "bits": bits, "group_size": group_size})
    kinds = FLOATS if mode == "affine" else (torch.uint8,)
    expected = {
        "weight": ((out_features, words), WORDS),
        "scales": ((out_features, groups), kinds),
    }
    if mode == "affine":
        expected["biases"] = expected["scales"]
    check_parts(files, name, expected)
    if mode != "affine":
        return DenseLayer(f"MLX's {mode}", partial(_floats, files, name, mode, group_size))

    def read() -> Grid:
        codes = unpack_stream(files.read_once(weight), bits, in_features)
        scale, offset = (files.read_once(f"{name}.{part}").double() for part in _PARTS[1:])
        return Grid(codes, scale, offset)

    group_of = neighbours(in_features, group_size)
    return affine_layer(read, f"MLX's {bits}-bit integers", bits, group_of, asked, rounding)


def _check_stated(name: str, settings: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise GraftError where the layer's own settings say something else than its tensors.

    Those of all layers are defaults, which mlx-lm replaces by what the tensors show.
    """
    own = settings.get(name)
    if own is False:
        raise GraftError(f"config.json says that {name} is not quantised, and its tensors are")
    for key, fact in found.items():
        stated = own.get(key, fact) if isinstance(own, dict) else fact
        if stated != fact:
            raise GraftError(
                f"config.json says of {name} that {key} is {quoted(stated)}, and its tensors are "
                f"{fact!r}: convert it again with mlx_lm"
            )
    if found["mode"] not in ("affine", *_MODES.values()):
        raise GraftError(f"{name} has bytes as scales, {found['mode']}, which is no mode of MLX")


def _floats(files: WeightFiles, name: str, mode: str, group_size: int) -> Tensor:
    stored = files.read_once(f"{name}.weight").view(torch.uint8)
    values = stored.view(torch.float8_e4m3fn) if mode == "mxfp8" else e2m1(stored)
    scales = files.read_once(f"{name}.scales")
    factors = scales.view(torch.float8_e4m3fn).float() if mode == "nvfp4" else powers(scales)
    return scaled(values, factors, (1, group_size))


MLX = MlxReader()
