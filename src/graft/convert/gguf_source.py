"""GGUF files, as llama.cpp writes them: Q4_0, Q4_1 and Q8_0 layers, and unquantised tensors.

Blocks of 32 neighbouring weights of a row, little-endian (ggml's block_q4_0 and so on):

- Q4_0, 18 bytes: fp16 scale d, 16 bytes of nibbles (code j low, code j + 16 high); w = d (q - 8);
- Q4_1, 20 bytes: fp16 scale d, fp16 minimum m, nibbles likewise; w = d q + m;
- Q8_0, 34 bytes: fp16 scale d, 32 signed bytes; w = d q.

All are groups of 32 in the int format: the offset is -8 d, m, and -128 d for the code q + 128.
Embeddings and the output head, of whatever type, are dequantised to float32.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import gguf.quants
import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor
from transformers import PreTrainedModel

from graft.convert.base import Reader
from graft.convert.config import ConvertConfig
from graft.convert.integers import Rounding, pack_integers
from graft.convert.source import PlainTensor, QuantisedLayer, ReadLayer, Source
from graft.errors import GraftError, raise_problems
from graft.formats.base import Packed
from graft.formats.int_group import IntGroupFormat
from graft.kernels.packed.planes import BLOCK, unpack_codes
from graft.model.families import family_of
from graft.model.gguf.config import gguf_config
from graft.model.gguf.file import FLOATS, GgufFile, GgufTensor, read_gguf
from graft.model.gguf.layout import rotary_heads, rows_from_gguf
from graft.model.gguf.load import gguf_places
from graft.model.subject import build_skeleton
from graft.model.targets import linear_layers
from graft.text import quoted

_INTEGERS = {
    GGMLQuantizationType.Q4_0: IntGroupFormat(4, BLOCK),
    GGMLQuantizationType.Q4_1: IntGroupFormat(4, BLOCK),
    GGMLQuantizationType.Q8_0: IntGroupFormat(8, BLOCK),
}


class GgufReader(Reader):
    """Files of llama.cpp."""

    def reads_file(self, file: Path) -> bool:
        """Return whether it is called .gguf."""
        return file.suffix == ".gguf"

    def open_file(self, file: Path, asked: ConvertConfig) -> tuple[Source, Path]:
        """Return what is in the file; it holds no tokenizer that graft reads."""
        return gguf_source(file), file


def gguf_source(path: Path) -> Source:
    """Return what is in a GGUF file; raises GraftError for types and tensors that have no place."""
    file, rounding = read_gguf(path), Rounding()
    model = build_skeleton(gguf_config(file), tensors=len(file.tensors))
    linear = linear_layers(model)
    layers: dict[str, ReadLayer] = {}
    tensors: dict[str, PlainTensor] = {}
    dequantised: list[str] = []
    unread: dict[GGMLQuantizationType, list[str]] = {}
    known = {"rope_freqs.weight"}
    for name, target, module in gguf_places(model):
        for part, _ in module.named_parameters(recurse=False):
            key = f"{target}.{part}"
            known.add(key)
            if key not in file.tensors:
                continue  # the writer names what is missing, in the model's own words
            tensor = file.tensors[key]
            order = _order(name, tensor, model)
            if tensor.type in FLOATS:
                tensors[f"{name}.{part}"] = _plain(tensor, order, _adds_one(target, model))
            elif name in linear and tensor.type in _INTEGERS:
                layers[name] = partial(_layer, key, tensor, order, rounding)
            elif name in linear or len(tensor.shape) != 2:
                unread.setdefault(tensor.type, []).append(key)
            else:
                tensors[f"{name}.{part}"] = _dequantised(file, key)
                dequantised.append(name)
    _check(file, known, unread)
    return Source("GGUF", model, layers, tensors, rounding, tuple(dequantised))


def _check(file: GgufFile, known: set[str], unread: dict[GGMLQuantizationType, list[str]]) -> None:
    problems = [
        f"{len(names)} tensors are {kind.name} ({names[0]} ...), which the int format does not "
        "hold; graft reads Q4_0, Q4_1 and Q8_0: take such a file, or start from the unquantised "
        "model"
        for kind, names in unread.items()
    ]
    strange = [name for name in file.tensors if name not in known]
    if strange:
        problems.append(
            f"{len(strange)} tensors have no place in a {file.metadata['general.architecture']} "
            f"({', '.join(map(quoted, strange[:3]))} ...)"
        )
    raise_problems(problems, str(file.path))


def _adds_one(target: str, model: PreTrainedModel) -> bool:
    return family_of(model.config).norms_add_one and target.endswith("norm")


def _order(name: str, tensor: GgufTensor, model: PreTrainedModel) -> Tensor | None:
    """Return for each row of the module the file's row that holds it, where they differ."""
    heads = rotary_heads(name, model.config)
    if heads is None or tensor.shape[0] % (2 * heads):
        return None
    return rows_from_gguf(tensor.shape[0], heads)


def _plain(tensor: GgufTensor, order: Tensor | None, adds_one: bool) -> PlainTensor:
    def make() -> Tensor:
        dense = tensor.dense()
        # llama.cpp multiplies by what is in the file, such a norm by 1 + weight.
        dense = dense - 1 if adds_one else dense
        return dense if order is None else dense[order]

    return PlainTensor(tensor.shape, FLOATS[tensor.type], make)


def _dequantised(file: GgufFile, key: str) -> PlainTensor:
    tensor = file.tensors[key]

    def make() -> Tensor:
        return torch.from_numpy(gguf.quants.dequantize(np.asarray(tensor.data), tensor.type))

    try:
        gguf.quants.dequantize(np.asarray(tensor.data[:1]), tensor.type)
    except NotImplementedError as error:
        raise GraftError(f"{file.path}: {key} is {tensor.type.name}, which is not read") from error
    return PlainTensor(tensor.shape, torch.float32, make)


def _layer(
    key: str,
    tensor: GgufTensor,
    order: Tensor | None,
    rounding: Rounding,
    out_features: int,
    in_features: int,
) -> QuantisedLayer:
    if tensor.shape != (out_features, in_features):
        raise GraftError(
            f"tensor {key} is {list(tensor.shape)}; the metadata make it "
            f"{[out_features, in_features]}"
        )
    weight_format = _INTEGERS[tensor.type]

    def make() -> Packed:
        rows = tensor.bytes() if order is None else tensor.bytes()[order]
        blocks = rows.unflatten(-1, (in_features // BLOCK, -1))
        scales = _halves(blocks[..., :2])
        if tensor.type is GGMLQuantizationType.Q4_1:
            data, offsets = blocks[..., 4:], _halves(blocks[..., 2:4])
        elif tensor.type is GGMLQuantizationType.Q4_0:
            data, offsets = blocks[..., 2:], -8 * scales
        else:
            data, offsets = blocks[..., 2:] ^ 128, -128 * scales  # a signed byte plus 128
        codes = unpack_codes((data.flatten(1),), weight_format.bits, in_features)
        return pack_integers(weight_format, codes, scales, offsets, BLOCK, rounding)

    return QuantisedLayer(weight_format, make)


def _halves(pairs: Tensor) -> Tensor:
    """Return fp16 numbers that lie in pairs of bytes, float64 without the last dimension."""
    return pairs.contiguous().view(torch.float16).squeeze(-1).double()


GGUF = GgufReader()
