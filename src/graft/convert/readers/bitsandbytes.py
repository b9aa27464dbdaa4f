"""bitsandbytes folders: 4-bit (NF4 and FP4, nested statistics or not) and LLM.int8.

The codebook formats of graft have the layout of bitsandbytes' 4-bit weights bit for bit; the parts
of a layer lie under weight, weight.absmax, weight.nested_absmax and so on, with a description as
JSON bytes in weight.quant_state.bitsandbytes__nf4 (or fp4). Larger blocks than graft's 64, which
some GPUs have, are cut into such. LLM.int8 has weight int8 and SCB, the absmax of each row:
w = code SCB / 127.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graft.convert.base import Reader
from graft.convert.config import ConvertConfig
from graft.convert.folder import ForeignFolder, check_parts, plain_tensors
from graft.convert.labels.settings import rounds_inputs
from graft.convert.source import DenseLayer, QuantisedLayer, Source
from graft.errors import GraftError, raise_problems
from graft.formats.base import Packed
from graft.formats.codebook import BLOCK_SIZE, CodebookFormat
from graft.formats.int8 import Int8Format
from graft.kernels.packed.codebooks import CODEBOOK_NAMES, codebook, dynamic_code
from graft.kernels.packed.weight import NESTED_BLOCK_SIZE
from graft.model.weight_files import WeightFiles
from graft.text import quoted

_STATE = ".weight.quant_state.bitsandbytes__"
_INT8_PARTS = ("weight", "SCB", "weight_format")


_DESCRIBED = {
    *("quant_type", "blocksize", "dtype", "shape"),
    *("nested_blocksize", "nested_dtype", "nested_offset"),
}


class BitsandbytesReader(Reader):
    """Folders that Transformers saved with bitsandbytes."""

    quant_method = "bitsandbytes"

    def reads_folder(self, folder: ForeignFolder) -> bool:
        """Return whether the settings say so; the oldest ones have only load_in_4bit or 8bit."""
        settings = folder.settings
        old = "quant_method" not in settings and {"load_in_4bit", "load_in_8bit"} & {*settings}
        return super().reads_folder(folder) or (bool(old) and not folder.is_pickled)

    def open_folder(self, folder: ForeignFolder) -> Source:
        """Return what is in a folder that Transformers saved with bitsandbytes."""
        files = folder.weights()
        states = {key.partition(_STATE)[0]: key for key in files if _STATE in key}
        eights = [key.removesuffix(".SCB") for key in files if key.endswith(".SCB")]
        parts = [key for key in files if key.startswith(tuple(f"{name}.weight" for name in states))]
        parts += [f"{name}.{part}" for name in eights for part in _INT8_PARTS]
        told = rounds_inputs("bitsandbytes", "the inputs of LLM.int8 layers")
        return Source(
            kind="bitsandbytes",
            model=folder.skeleton(len(files)),
            layers={
                **{
                    name: partial(_four_bits, files, name, key, folder.asked)
                    for name, key in states.items()
                },
                **{name: partial(_eight_bits, files, name) for name in eights},
            },
            tensors=plain_tensors(files, parts),
            notes=[told] if eights else [],
        )


def _four_bits(
    files: WeightFiles,
    name: str,
    key: str,
    asked: ConvertConfig,
    out_features: int,
    in_features: int,
) -> QuantisedLayer | DenseLayer:
    kind = key.partition(_STATE)[2]
    state = _state(files, key)
    nested = "nested_offset" in state
    _check_state(files, name, kind, state, (out_features, in_features))
    weight, count = f"{name}.weight", out_features * in_features
    size, nested_size = state["blocksize"], state.get("nested_blocksize", NESTED_BLOCK_SIZE)
    blocks = -(-count // size)
    places = {"absmax": "absmax"} | ({"absmax_scale": "nested_absmax"} if nested else {})
    expected = {"absmax": ((blocks,), (torch.uint8 if nested else torch.float32,))}
    if nested:
        expected["nested_absmax"] = ((-(-blocks // nested_size),), (torch.float32,))
    check_parts(files, weight, expected)
    # bnb_4bit_quant_storage may call the bytes something else.
    stored = files.read_once(weight).view(torch.uint8).numel() if weight in files else 0
    if stored != -(-count // 2):
        raise GraftError(f"{weight} holds {stored} bytes of codes; expected {-(-count // 2)}")

    def codes() -> Tensor:
        return files.read_once(weight).view(torch.uint8).reshape(-1)

    def absmax() -> Tensor:
        largest = files.read_once(f"{weight}.absmax")
        if not nested:
            return largest
        scales = files.read_once(f"{weight}.nested_absmax").repeat_interleave(nested_size)
        return dynamic_code()[largest.int()] * scales[:blocks] + state["nested_offset"]

    def alike() -> Packed:
        packed = {part: files.read_once(f"{weight}.{place}") for part, place in places.items()}
        packed["codes"] = codes()
        if nested:
            packed["absmax_offset"] = torch.tensor([state["nested_offset"]], dtype=torch.float32)
        return packed

    def cut() -> Packed:
        held = absmax().repeat_interleave(size // BLOCK_SIZE)[: -(-count // BLOCK_SIZE)]
        return {"codes": codes(), "absmax": held.contiguous()}

    def dense() -> Tensor:
        packed = codes()
        values = codebook(kind)[torch.stack((packed >> 4, packed & 15), -1).flatten().int()]
        scales = absmax().repeat_interleave(size)[:count]
        return (values[:count] * scales).reshape(out_features, in_features)

    if size == BLOCK_SIZE and nested_size == NESTED_BLOCK_SIZE:
        return QuantisedLayer(CodebookFormat(kind, nested), alike)
    if size % BLOCK_SIZE == 0 and not asked.dequantise:
        return QuantisedLayer(CodebookFormat(kind), cut)
    return DenseLayer(f"{kind} in blocks of {size}", dense)


def _state(files: WeightFiles, key: str) -> dict[str, Any]:
    try:
        stored = files.read_once(key)
        if stored.dtype != torch.uint8 or stored.dim() != 1:
            raise ValueError(f"it is {stored.dtype} of {stored.dim()} dimensions, and no text")
        state = json.loads(stored.numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise GraftError(f"{key} is no JSON ({error}); download the folder again") from error
    if not isinstance(state, dict):
        raise GraftError(f"{key} holds no JSON object; download the folder again")
    return state


def _check_state(
    files: WeightFiles, name: str, kind: str, state: dict[str, Any], shape: tuple[int, int]
) -> None:
    """Raise GraftError unless the layer is laid out as the codebook formats are."""
    if kind not in CODEBOOK_NAMES:
        raise GraftError(f"{name} is {kind!r}; graft reads {' and '.join(CODEBOOK_NAMES)}")
    problems = [
        f"it has {quoted(key)}, which is not read" for key in state if key not in _DESCRIBED
    ]
    if state.get("quant_type", kind) != kind:
        problems.append(f"quant_type is {quoted(state['quant_type'])}; expected {kind!r}")
    maps = {"quant_map": codebook(kind)}
    sizes = {"blocksize": state.get("blocksize")}
    if "nested_offset" in state:
        maps["nested_quant_map"] = dynamic_code()
        sizes["nested_blocksize"] = state.get("nested_blocksize")
        if not isinstance(state["nested_offset"], (int, float)):
            problems.append(f"nested_offset is {quoted(state['nested_offset'])}; expected a number")
    for field, size in sizes.items():
        if type(size) is not int or size < 2 or size & size - 1:
            problems.append(f"{field} is {quoted(size)}; expected a power of two")
    if state.get("shape") != list(shape):
        problems.append(f"shape is {quoted(state.get('shape'))}; expected {list(shape)}")
    for part, values in maps.items():
        place = f"{name}.weight.{part}"
        if place not in files:
            problems.append(f"tensor {place} is missing")
        elif not torch.equal(files.read_once(place).float(), values):
            problems.append(f"{part} holds other values than {kind}'s")
    raise_problems(problems, name)


def _eight_bits(
    files: WeightFiles, name: str, out_features: int, in_features: int
) -> QuantisedLayer:
    expected = {
        "weight": ((out_features, in_features), (torch.int8,)),
        "SCB": ((out_features,), (torch.float32,)),
    }
    check_parts(files, name, expected)
    layout = f"{name}.weight_format"
    if layout in files and int(files.read_once(layout)):
        raise GraftError(f"{name}: its weight is not stored row by row; save the folder again")

    def make() -> Packed:
        rows = files.read_once(f"{name}.SCB")
        return {"codes": files.read_once(f"{name}.weight"), "scales": rows / 127}

    return QuantisedLayer(Int8Format(), make)


BITSANDBYTES = BitsandbytesReader()
