"""Layers of a GGUF file: in the int format where that holds them exactly, else as floats.

Blocks of neighbouring weights of a row, little-endian (ggml's block_q4_0 and so on), d in fp16:

- Q4_0, 32 weights in 18 bytes: d, 16 bytes of nibbles (code j low, j + 16 high); w = d (q - 8);
- Q4_1, 32 in 20: d, a minimum m in fp16, nibbles likewise; w = d q + m;
- Q8_0, 32 in 34: d, 32 signed bytes; w = d q;
- Q1_0, 128 in 18: d, 128 bits; w = d or -d;
- TQ1_0 and TQ2_0, 256 in 54 and 66: digits of three values, d at the end; w = d (q - 1).

The offset is -8 d, m, -128 d for the code q + 128, and -d (with the scale 2 d for Q1_0).
"""

from __future__ import annotations

import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from graft.convert.grids.integers import Rounding, pack_integers
from graft.convert.source import DenseLayer, QuantisedLayer
from graft.errors import GraftError
from graft.formats.base import Packed
from graft.formats.int_group import IntGroupFormat
from graft.kernels.packed.planes import BLOCK, unpack_codes
from graft.model.gguf.file import GgufTensor

_INTEGERS = {
    Kind.Q4_0: IntGroupFormat(4, BLOCK),
    Kind.Q4_1: IntGroupFormat(4, BLOCK),
    Kind.Q8_0: IntGroupFormat(8, BLOCK),
    Kind.Q1_0: IntGroupFormat(2, 128),
    Kind.TQ1_0: IntGroupFormat(2, 128),
    Kind.TQ2_0: IntGroupFormat(2, 128),
}
_WEIGHTS = {Kind.Q1_0: 128, Kind.TQ1_0: 256, Kind.TQ2_0: 256}
"""Weights of a block, where they are not 32."""


def dense_rows(tensor: GgufTensor, order: Tensor | None) -> Tensor:
    """Return a tensor as floats, in the module's order of rows."""
    dense = tensor.dense()
    return dense if order is None else dense[order]


def read_layer(
    key: str,
    tensor: GgufTensor,
    order: Tensor | None,
    rounding: Rounding,
    out_features: int,
    in_features: int,
) -> QuantisedLayer | DenseLayer:
    """Return a quantised layer's weight; order: of the file's rows, for each of the module's.

    Raises GraftError where it has another shape.
    """
    if tensor.shape != (out_features, in_features):
        raise GraftError(
            f"tensor {key} is {list(tensor.shape)}; the metadata make it "
            f"{[out_features, in_features]}"
        )
    if tensor.type not in _INTEGERS:
        return DenseLayer(tensor.type.name, lambda: dense_rows(tensor, order))
    weight_format = _INTEGERS[tensor.type]

    def make() -> Packed:
        rows = tensor.bytes() if order is None else tensor.bytes()[order]
        weights = _WEIGHTS.get(tensor.type, BLOCK)
        blocks = rows.unflatten(-1, (in_features // weights, -1))
        if tensor.type in _WEIGHTS:
            codes, scales, offsets = _few(tensor.type, blocks, dense_rows(tensor, order))
        else:
            data, scales, offsets = _many(tensor.type, blocks)
            codes = unpack_codes((data.flatten(1),), weight_format.bits, in_features)
        return pack_integers(weight_format, codes, scales, offsets, weights, rounding)

    return QuantisedLayer(weight_format, make)


def _many(kind: Kind, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return packed codes, scales and offsets of 4 or 8 bits."""
    scales = _halves(blocks[..., :2])
    if kind is Kind.Q4_1:
        return blocks[..., 4:], scales, _halves(blocks[..., 2:4])
    if kind is Kind.Q4_0:
        return blocks[..., 2:], scales, -8 * scales
    return blocks[..., 2:] ^ 128, scales, -128 * scales  # a signed byte plus 128


def _few(kind: Kind, blocks: Tensor, dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and offsets of two or three values."""
    signs = kind is Kind.Q1_0
    scales = _halves(blocks[..., :2] if signs else blocks[..., -2:])
    steps = dense.unflatten(-1, (scales.shape[-1], -1)) / scales.unsqueeze(-1)
    steps = torch.where(scales.unsqueeze(-1) == 0, 0.0, steps).round()
    codes = ((steps + 1) / 2 if signs else steps + 1).to(torch.uint8).flatten(1)
    return codes, 2 * scales if signs else scales, -scales


def _halves(pairs: Tensor) -> Tensor:
    """Return fp16 numbers that lie in pairs of bytes, float64 without the last dimension."""
    return pairs.contiguous().view(torch.float16).squeeze(-1).double()
