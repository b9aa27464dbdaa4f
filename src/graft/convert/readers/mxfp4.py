"""MXFP4 folders of gpt-oss: fused experts in 4-bit floats.

Instead of NAME [experts, in_features, out_features] there are

- NAME_blocks uint8 [experts, out_features, groups, 16]: E2M1, two to a byte, the first one low;
- NAME_scales uint8 [experts, out_features, groups]: E8M0, one for the 32 of a group.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from graft.convert.base import Reader
from graft.convert.folder import ForeignFolder, plain_tensors
from graft.convert.grids.floats import e2m1, powers
from graft.convert.labels.settings import unread
from graft.convert.source import PlainTensor, Source
from graft.errors import GraftError
from graft.model.weight_files import WeightFiles

_BLOCKS, _SCALES = "_blocks", "_scales"
_KNOWN = {"quant_method", "modules_to_not_convert", "dequantize"}


class Mxfp4Reader(Reader):
    """Folders of gpt-oss."""

    quant_method = "mxfp4"

    def open_folder(self, folder: ForeignFolder) -> Source:
        """Return what is in the folder; raises GraftError for parts that do not fit."""
        files = folder.weights()
        names = [key.removesuffix(_BLOCKS) for key in files if key.endswith(_BLOCKS)]
        parts = [name + part for name in names for part in (_BLOCKS, _SCALES)]
        return Source(
            kind="MXFP4",
            model=folder.skeleton(len(files)),
            layers={},
            tensors=plain_tensors(files, parts) | {name: _experts(files, name) for name in names},
            notes=unread(folder, _KNOWN),
        )


def _experts(files: WeightFiles, name: str) -> PlainTensor:
    blocks, scales = name + _BLOCKS, name + _SCALES
    if scales not in files:
        raise GraftError(f"tensor {scales} is missing")
    shape = files.shape(blocks)
    fits = len(shape) == 4 and shape[3] == 16 and files.shape(scales) == shape[:3]
    bytes_alone = files.dtype(blocks) == files.dtype(scales) == torch.uint8
    if not fits or not bytes_alone:
        raise GraftError(
            f"{blocks} is {list(shape)} and {scales} {list(files.shape(scales))}; expected bytes "
            "[experts, outputs, groups, 16] and [experts, outputs, groups]"
        )
    experts, rows, groups, _ = shape
    made = (experts, groups * 32, rows)
    return PlainTensor(made, torch.float32, partial(_made, files, blocks, scales), "MXFP4")


def _made(files: WeightFiles, blocks: str, scales: str) -> Tensor:
    values = e2m1(files.read_once(blocks))
    factors = powers(files.read_once(scales)).unsqueeze(-1)
    return (values * factors).flatten(-2).transpose(1, 2).contiguous()


MXFP4 = Mxfp4Reader()
