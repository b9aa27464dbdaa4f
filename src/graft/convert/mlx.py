"""MLX folders with affine quantisation, as mlx-lm writes them.

A module holds weight uint32 [rows, columns * bits / 32], a row being one stream of bits with the
first code lowest, and scales and biases float [rows, groups]: w = scale q + bias, which is the int
format. Embeddings are quantised too, and are dequantised here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from graft.convert.base import Reader
from graft.convert.folder import FLOATS, WORDS, ForeignFolder, check_parts, plain_tensors, size
from graft.convert.integers import (
    Rounding,
    held_group_size,
    pack_integers,
    unpack_words,
    width_of,
)
from graft.convert.source import QuantisedLayer, Source
from graft.errors import GraftError
from graft.formats.base import Packed
from graft.formats.int_group import IntGroupFormat
from graft.model.families import FAMILIES
from graft.model.weight_files import WeightFiles

_PARTS = ("weight", "scales", "biases")


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
        return Source(
            kind="MLX",
            model=folder.skeleton(len(files)),
            layers={
                name: partial(_layer, files, name, _mode(settings, name), rounding)
                for name in names
            },
            tensors=plain_tensors(files, (f"{name}.{part}" for name in names for part in _PARTS)),
            rounding=rounding,
        )


def _mode(settings: dict[str, Any], name: str) -> str:
    of_layer = settings.get(name)
    mode = of_layer.get("mode") if isinstance(of_layer, dict) else None
    return str(mode or settings.get("mode") or "affine")


def _layer(
    files: WeightFiles,
    name: str,
    mode: str,
    rounding: Rounding,
    out_features: int,
    in_features: int,
) -> QuantisedLayer:
    if mode != "affine":
        raise GraftError(
            f"{name} is quantised in MLX's mode {mode!r}; graft reads affine: start from the "
            "unquantised model"
        )
    weight, scales = f"{name}.weight", f"{name}.scales"
    bits = width_of(size(files, weight, 1), in_features, weight, "MLX")
    groups = size(files, scales, 1)
    if in_features % groups:
        raise GraftError(
            f"{name} has {groups} groups of its {in_features} inputs, which are not equal parts; "
            "the folder is damaged: convert it again with mlx_lm"
        )
    expected = {
        "weight": ((out_features, in_features * bits // 32), WORDS),
        "scales": ((out_features, groups), FLOATS),
        "biases": ((out_features, groups), FLOATS),
    }
    check_parts(files, name, expected)
    group_size = in_features // groups
    weight_format = IntGroupFormat(bits, held_group_size(name, group_size, groups))

    def make() -> Packed:
        codes = unpack_words(files.read_once(weight), bits)
        scale, offset = (files.read_once(f"{name}.{part}").double() for part in _PARTS[1:])
        return pack_integers(weight_format, codes, scale, offset, group_size, rounding)

    return QuantisedLayer(weight_format, make)


MLX = MlxReader()
