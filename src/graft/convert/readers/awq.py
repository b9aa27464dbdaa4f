"""AWQ folders, as AutoAWQ, GPTQModel and auto-round write them.

Version "gemm" (and "exllama" and "ipex", which compute otherwise with the same files):

- qweight int32 [in_features, out_features / 8]: eight 4-bit codes of neighbouring outputs a word,
  in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits up;
- qzeros int32 [groups, out_features / 8]: the zero points, likewise;
- scales float [groups, out_features].

auto-round has 5, 6 and 7 bits too: eight codes in that order, one stream of bits.

Version "gemv", whose rows are filled up with zeros:

- qweight int32 [out_features, in_features / 8]: neighbouring inputs, the first lowest;
- qzeros int32 [out_features, words] and scales float [out_features, 8 words]: a row's groups.

w = scale (q - zero) (AWQ, arXiv 2306.00978), which the int format holds as scale q + offset.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from graft.convert.base import Reader
from graft.convert.folder import FLOATS, WORDS, ForeignFolder, check_parts, plain_tensors, size
from graft.convert.grids.affine import Grid, affine_layer, neighbours, unpack_stream
from graft.convert.grids.integers import Rounding, width_of
from graft.convert.labels.integer_settings import check_settings
from graft.convert.source import DenseLayer, QuantisedLayer, Source
from graft.errors import GraftError, raise_problems
from graft.model.weight_files import WeightFiles
from graft.text import quoted

_PARTS = ("qweight", "qzeros", "scales")
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in its word each of eight neighbouring outputs lies."""
_BITS = (4, 5, 6, 7)
_IN_GEMM_ORDER = ("gemm", "exllama", "ipex")


class AwqReader(Reader):
    """Folders of AutoAWQ."""

    quant_method = "awq"

    def open_folder(self, folder: ForeignFolder) -> Source:
        """Return what is in an AWQ folder; raises GraftError for versions other than the above."""
        settings = folder.settings
        named = [settings.get(key) for key in ("version", "checkpoint_format", "format")]
        version = str(next((name for name in named if name), "gemm")).lower()
        problems = []
        if version not in (*_IN_GEMM_ORDER, "gemv"):
            problems.append(
                f"its version is {quoted(version)}; graft reads 'gemm' and 'gemv': save the "
                "checkpoint anew in one of them, or start from the unquantised model"
            )
        if settings.get("bits", 4) not in _BITS:
            problems.append(f"bits is {quoted(settings['bits'])}; graft reads AWQ of 4 bits")
        raise_problems(problems, str(folder.folder))
        return open_awq(folder, "AWQ", version)


def open_awq(folder: ForeignFolder, tool: str, version: str) -> Source:
    """Return what is in a folder of such layers."""
    layers = _Layers(folder.weights(), folder)
    files = layers.files
    names = [key.removesuffix(".qweight") for key in files if key.endswith(".qweight")]
    read = layers.read_gemv if version == "gemv" else layers.read_gemm
    return Source(
        kind=f"{tool} ({version})",
        model=folder.skeleton(len(files)),
        layers={name: partial(read, name) for name in names},
        tensors=plain_tensors(files, (f"{name}.{part}" for name in names for part in _PARTS)),
        rounding=layers.rounding,
        notes=check_settings(str(folder.folder), folder.settings),
    )


@dataclass(frozen=True)
class _Layers:
    """What is known of every layer of a folder."""

    files: WeightFiles
    folder: ForeignFolder
    rounding: Rounding = field(default_factory=Rounding)

    def read_gemm(
        self, name: str, out_features: int, in_features: int
    ) -> QuantisedLayer | DenseLayer:
        """Return a layer whose words are of neighbouring outputs."""
        files, scales = self.files, f"{name}.scales"
        groups, words = size(files, scales, 0), size(files, f"{name}.qweight", 1)
        bits = width_of(words, out_features, f"{name}.qweight", "AWQ", _BITS)
        expected = {
            "qweight": ((in_features, words), WORDS),
            "qzeros": ((groups, words), WORDS),
            "scales": ((groups, out_features), FLOATS),
        }
        check_parts(files, name, expected)
        if in_features % groups:
            raise GraftError(
                f"{name} has {groups} groups of its {in_features} inputs, which are not equal "
                "parts; the checkpoint is damaged: download it again"
            )

        def read() -> Grid:
            codes, zeros = (
                _in_order(unpack_stream(files.read_once(f"{name}.{part}"), bits, out_features)).T
                for part in ("qweight", "qzeros")
            )
            scale = files.read_once(scales).T.double()
            return Grid(codes, scale, -scale * zeros)

        return self._layer(read, bits, in_features, in_features // groups)

    def read_gemv(
        self, name: str, out_features: int, in_features: int
    ) -> QuantisedLayer | DenseLayer:
        """Return a layer whose words are of neighbouring inputs, in rows that are filled up."""
        files, scales = self.files, f"{name}.scales"
        given = self.folder.settings.get("group_size")
        group_size = in_features if given == -1 else given
        if not isinstance(group_size, int) or group_size < 1 or in_features % group_size:
            raise GraftError(
                f"{name}: group_size is {quoted(given)}, which does not divide its {in_features} "
                "inputs"
            )
        groups, words = in_features // group_size, size(files, f"{name}.qzeros", 1)
        expected = {
            "qweight": ((out_features, in_features // 8), WORDS),
            "qzeros": ((out_features, words), WORDS),
            "scales": ((out_features, words * 8), FLOATS),
        }
        check_parts(files, name, expected)
        if groups > words * 8:
            raise GraftError(
                f"{name}.scales holds {words * 8} a row, and groups of {group_size} are {groups}"
            )

        def read() -> Grid:
            codes, zeros = (
                unpack_stream(files.read_once(f"{name}.{part}"), 4, count)
                for part, count in (("qweight", in_features), ("qzeros", groups))
            )
            scale = files.read_once(scales)[:, :groups].double()
            return Grid(codes, scale, -scale * zeros)

        return self._layer(read, 4, in_features, group_size)

    def _layer(
        self, read: Callable[[], Grid], bits: int, in_features: int, group_size: int
    ) -> QuantisedLayer | DenseLayer:
        words = f"AWQ of {bits} bits in groups of {group_size}"
        group_of = neighbours(in_features, group_size)
        return affine_layer(read, words, bits, group_of, self.folder.asked, self.rounding)


def _in_order(codes: Tensor) -> Tensor:
    """Return the codes of each word in the order of the outputs."""
    return codes.unflatten(-1, (-1, 8))[..., torch.tensor(_PLACES)].flatten(-2)


AWQ = AwqReader()
