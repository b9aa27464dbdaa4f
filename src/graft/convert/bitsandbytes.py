"""bitsandbytes folders: 4-bit (NF4 and FP4, nested statistics or not) and LLM.int8.

The codebook formats of graft have the layout of bitsandbytes' 4-bit weights bit for bit; the parts
of a layer lie under weight, weight.absmax, weight.nested_absmax and so on, with a description as
JSON bytes in weight.quant_state.bitsandbytes__nf4 (or fp4). LLM.int8 has weight int8 and SCB, the
absmax of each row: w = code SCB / 127.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import torch

from graft.convert.base import Reader
from graft.convert.folder import ForeignFolder, check_parts, plain_tensors
from graft.convert.source import QuantisedLayer, Source
from graft.errors import GraftError, raise_problems
from graft.formats.base import Packed
from graft.formats.codebook import BLOCK_SIZE, CodebookFormat
from graft.formats.int8 import Int8Format
from graft.kernels.packed.codebooks import CODEBOOK_NAMES, codebook, dynamic_code
from graft.kernels.packed.weight import NESTED_BLOCK_SIZE
from graft.model.weight_files import WeightFiles

_STATE = ".weight.quant_state.bitsandbytes__"
_INT8_PARTS = ("weight", "SCB", "weight_format")


class BitsandbytesReader(Reader):
    """Folders that Transformers saved with bitsandbytes."""

    quant_method = "bitsandbytes"

    def open_folder(self, folder: ForeignFolder) -> Source:
        """Return what is in a folder that Transformers saved with bitsandbytes."""
        files = folder.weights()
        states = {key.partition(_STATE)[0]: key for key in files if _STATE in key}
        eights = [key.removesuffix(".SCB") for key in files if key.endswith(".SCB")]
        parts = [key for key in files if key.startswith(tuple(f"{name}.weight" for name in states))]
        parts += [f"{name}.{part}" for name in eights for part in _INT8_PARTS]
        return Source(
            kind="bitsandbytes",
            model=folder.skeleton(len(files)),
            layers={
                **{name: partial(_four_bits, files, name, key) for name, key in states.items()},
                **{name: partial(_eight_bits, files, name) for name in eights},
            },
            tensors=plain_tensors(files, parts),
        )


def _four_bits(
    files: WeightFiles, name: str, key: str, out_features: int, in_features: int
) -> QuantisedLayer:
    kind = key.partition(_STATE)[2]
    state = _state(files, key)
    nested = "nested_offset" in state
    _check_state(files, name, kind, state, (out_features, in_features))
    weight_format = CodebookFormat(kind, nested)
    specs = weight_format.storage(out_features, in_features)
    weight, places = f"{name}.weight", {"absmax": "absmax"}
    if nested:
        places["absmax_scale"] = "nested_absmax"
    expected = {place: (specs[part].shape, (specs[part].dtype,)) for part, place in places.items()}
    check_parts(files, weight, expected)
    # bnb_4bit_quant_storage may call the bytes something else.
    size = files.read_once(weight).view(torch.uint8).numel() if weight in files else 0
    if size != specs["codes"].bytes:
        raise GraftError(f"{weight} holds {size} bytes of codes; expected {specs['codes'].bytes}")

    def make() -> Packed:
        packed = {part: files.read_once(f"{weight}.{place}") for part, place in places.items()}
        packed["codes"] = files.read_once(weight).view(torch.uint8).reshape(-1)
        if nested:
            packed["absmax_offset"] = torch.tensor([state["nested_offset"]], dtype=torch.float32)
        return packed

    return QuantisedLayer(weight_format, make)


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
    problems = []
    nested = "nested_offset" in state
    expected: dict[str, object] = {"blocksize": BLOCK_SIZE, "shape": list(shape)}
    maps = {"quant_map": codebook(kind)}
    if nested:
        expected["nested_blocksize"] = NESTED_BLOCK_SIZE
        maps["nested_quant_map"] = dynamic_code()
    for field, value in expected.items():
        if state.get(field) != value:
            problems.append(f"{field} is {state.get(field)!r}; graft reads {value!r}")
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
