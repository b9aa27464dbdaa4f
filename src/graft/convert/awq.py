"""AWQ folders of version "gemm", as AutoAWQ writes them.

- qweight int32 [in_features, out_features / 8]: eight 4-bit codes of neighbouring outputs a word,
  in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits up;
- qzeros int32 [groups, out_features / 8]: the zero points, likewise;
- scales float [groups, out_features].

w = scale (q - zero) (AWQ, arXiv 2306.00978), which the int format holds as scale q + offset.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from graft.convert.base import Reader
from graft.convert.folder import FLOATS, WORDS, ForeignFolder, check_parts, plain_tensors, size
from graft.convert.integers import Rounding, held_group_size, pack_integers, unpack_words
from graft.convert.source import QuantisedLayer, Source
from graft.errors import GraftError, raise_problems
from graft.formats.base import Packed
from graft.formats.int_group import IntGroupFormat
from graft.model.weight_files import WeightFiles

_PARTS = ("qweight", "qzeros", "scales")
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in its word each of eight neighbouring outputs lies."""
_BITS = 4


class AwqReader(Reader):
    """Folders of AutoAWQ."""

    quant_method = "awq"

    def open_folder(self, folder: ForeignFolder) -> Source:
        """Return what is in an AWQ folder; raises GraftError for versions other than gemm."""
        settings = folder.settings
        named = settings.get("version") or settings.get("checkpoint_format") or "gemm"
        version = str(named).lower()
        problems = []
        if version != "gemm":
            problems.append(
                f"its version is {version!r}; graft reads 'gemm': save the checkpoint anew in it, "
                "or start from the unquantised model"
            )
        if settings.get("bits", _BITS) != _BITS:
            problems.append(f"bits is {settings['bits']}; AWQ's gemm version has {_BITS}")
        if not settings.get("zero_point", True):
            problems.append("zero_point is false; graft reads AWQ with zero points")
        raise_problems(problems, str(folder.folder))
        files, rounding = folder.weights(), Rounding()
        names = [key.removesuffix(".qweight") for key in files if key.endswith(".qweight")]
        return Source(
            kind="AWQ (gemm)",
            model=folder.skeleton(len(files)),
            layers={name: partial(_layer, files, name, rounding) for name in names},
            tensors=plain_tensors(files, (f"{name}.{part}" for name in names for part in _PARTS)),
            rounding=rounding,
        )


def _layer(
    files: WeightFiles, name: str, rounding: Rounding, out_features: int, in_features: int
) -> QuantisedLayer:
    scales = f"{name}.scales"
    groups = size(files, scales, 0)
    words = out_features // 8
    expected = {
        "qweight": ((in_features, words), WORDS),
        "qzeros": ((groups, words), WORDS),
        "scales": ((groups, out_features), FLOATS),
    }
    check_parts(files, name, expected)
    if in_features % groups:
        raise GraftError(
            f"{name} has {groups} groups of its {in_features} inputs, which are not equal parts; "
            "the checkpoint is damaged: download it again"
        )
    group_size = in_features // groups
    weight_format = IntGroupFormat(_BITS, held_group_size(name, group_size, groups))

    def make() -> Packed:
        codes, zeros = (
            _in_order(unpack_words(files.read_once(f"{name}.{part}"), _BITS)).T
            for part in ("qweight", "qzeros")
        )
        scale = files.read_once(scales).T.double()
        return pack_integers(weight_format, codes, scale, -scale * zeros, group_size, rounding)

    return QuantisedLayer(weight_format, make)


def _in_order(codes: Tensor) -> Tensor:
    """Return the codes of each word in the order of the outputs."""
    return codes.unflatten(-1, (-1, 8))[..., torch.tensor(_PLACES)].flatten(-2)


AWQ = AwqReader()
