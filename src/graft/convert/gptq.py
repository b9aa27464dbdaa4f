"""GPTQ folders, as AutoGPTQ and GPTQModel write them.

A layer holds, in 32-bit words whose bits are one stream, the first code lowest:

- qweight [in_features * bits / 32, out_features]: the codes, packed along the inputs;
- qzeros [groups, out_features * bits / 32]: the zero points, packed along the outputs, minus one
  modulo 2^bits in checkpoint_format "gptq", as they are in "gptq_v2";
- scales float [groups, out_features];
- g_idx [in_features]: the group of each input.

w = scale (q - zero) (GPTQ, arXiv 2210.17323), which the int format holds as scale q + offset.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

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
from graft.model.weight_files import WeightFiles

_LAYOUTS = ("gptq", "gptq_v2")
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


class GptqReader(Reader):
    """Folders of AutoGPTQ and GPTQModel."""

    quant_method = "gptq"

    def open_folder(self, folder: ForeignFolder) -> Source:
        """Return what is in a GPTQ folder; raises GraftError for layouts other than the above."""
        settings = folder.settings
        layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        if layout not in _LAYOUTS:
            raise GraftError(
                f"{folder.folder}: checkpoint_format is {layout!r}; graft reads "
                f"{' and '.join(_LAYOUTS)}: save the checkpoint anew in one of them, or start from "
                "the unquantised model"
            )
        files, rounding = folder.weights(), Rounding()
        names = [key.removesuffix(".qweight") for key in files if key.endswith(".qweight")]
        return Source(
            kind=f"GPTQ ({layout})",
            model=folder.skeleton(len(files)),
            layers={
                name: partial(_layer, files, name, settings, layout == "gptq", rounding)
                for name in names
            },
            tensors=plain_tensors(files, (f"{name}.{part}" for name in names for part in _PARTS)),
            rounding=rounding,
        )


def _layer(
    files: WeightFiles,
    name: str,
    settings: dict[str, Any],
    minus_one: bool,
    rounding: Rounding,
    out_features: int,
    in_features: int,
) -> QuantisedLayer:
    qweight, scales = f"{name}.qweight", f"{name}.scales"
    bits = width_of(size(files, qweight, 0), in_features, qweight, "GPTQ")
    groups = size(files, scales, 0)
    if out_features * bits % 32:
        raise GraftError(
            f"{name} has {out_features} outputs, whose zero points fill no whole 32-bit words; "
            "start from the unquantised model"
        )
    expected = {
        "qweight": ((in_features * bits // 32, out_features), WORDS),
        "qzeros": ((groups, out_features * bits // 32), WORDS),
        "scales": ((groups, out_features), FLOATS),
    }
    check_parts(files, name, expected)
    group_size = _group_size(name, settings.get("group_size"), groups, in_features)
    _check_order(files, name, settings, groups, group_size, in_features)
    weight_format = IntGroupFormat(bits, held_group_size(name, group_size, groups))

    def make() -> Packed:
        codes = unpack_words(files.read_once(qweight).T, bits)
        zeros = unpack_words(files.read_once(f"{name}.qzeros"), bits).T
        if minus_one:
            zeros = zeros + 1 & weight_format.levels
        scale = files.read_once(scales).T.double()
        return pack_integers(weight_format, codes, scale, -scale * zeros, group_size, rounding)

    return QuantisedLayer(weight_format, make)


def _group_size(name: str, configured: object, groups: int, in_features: int) -> int:
    """Return the inputs of a group: as config.json says, unless this layer has its own."""
    if groups == 1:
        return in_features
    given = configured if isinstance(configured, int) else 0
    if given > 0 and math.ceil(in_features / given) == groups:
        return given
    if in_features % groups == 0:
        return in_features // groups
    raise GraftError(
        f"{name} has {groups} groups of its {in_features} inputs, which are not equal parts and "
        f"not of group_size {configured!r}; the checkpoint is damaged: download it again"
    )


def _check_order(
    files: WeightFiles,
    name: str,
    settings: dict[str, Any],
    groups: int,
    group_size: int,
    in_features: int,
) -> None:
    """Raise GraftError unless the groups are of neighbouring inputs."""
    key = f"{name}.g_idx"
    if key in files:
        check_parts(files, name, {"g_idx": ((in_features,), WORDS)})
        ordered = torch.arange(in_features, dtype=torch.int32) // group_size
        if torch.equal(files.read_once(key).view(torch.int32), ordered):
            return
    elif groups == 1 or not settings.get("desc_act") or settings.get("static_groups"):
        return
    raise GraftError(
        f"{name}: its inputs are grouped by activation order (desc_act), and graft's groups are of "
        "neighbouring inputs; quantise again with desc_act false or static_groups true, or start "
        "from the unquantised model"
    )


GPTQ = GptqReader()
