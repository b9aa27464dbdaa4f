"""torchao folders, as Transformers saves them: flattened tensor subclasses in safetensors.

The file's metadata name the class and the attributes of each tensor LAYER.weight, whose parts lie
under LAYER._weight_PART. Read are

- Int8Tensor, IntxUnpackedToInt8Tensor: w = scale (qdata - zero_point), a scale for each block;
- Int4Tensor: qdata [out, in / 2], two signed codes to a byte, the first one low, and scale and
  zero_point [groups, out]: w = scale q + zero_point;
- Float8Tensor, MXTensor, NVFP4Tensor: small floats times scale, and per_tensor_scale.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from graft.convert.base import Reader
from graft.convert.config import ConvertConfig
from graft.convert.folder import ForeignFolder, plain_tensors
from graft.convert.grids.integers import Rounding
from graft.convert.grids.torchao_tensors import KINDS, Stored
from graft.convert.labels.settings import rounds_inputs, unread
from graft.convert.source import Source
from graft.errors import GraftError, Problems
from graft.model.weight_files import WeightFiles
from graft.text import listed, quoted

_KNOWN = {
    *("quant_method", "quant_type", "modules_to_not_convert", "untie_embedding_weights"),
    *("include_input_output_embeddings", "quant_type_kwargs"),
}
_PART = "._weight_"
_ROUNDED = ("act_quant_kwargs", "activation_quantization")
_OTHERS = {
    "Int4TilePackedTo4dTensor": "is laid out for the kernels of one kind of GPU",
    "Int4PlainInt32Tensor": "is laid out for the kernels of one kind of processor",
}


class TorchaoReader(Reader):
    """Folders that Transformers saved with torchao."""

    quant_method = "torchao"

    def open_folder(self, folder: ForeignFolder) -> Source:
        """Return what is in the folder; raises GraftError for classes that are not read."""
        files, rounding = folder.weights(), Rounding()
        found = _described(folder, files)
        names = [name.removesuffix(".weight") for name in found]
        parts = [key for key in files if _PART in key]
        notes = unread(folder, _KNOWN)
        if any(stored.attributes.get(key) for stored in found.values() for key in _ROUNDED):
            notes.append(rounds_inputs("torchao"))
        kinds = sorted({stored.kind for stored in found.values()})
        return Source(
            kind=f"torchao ({', '.join(kinds)})" if kinds else "torchao",
            model=folder.skeleton(len(files)),
            layers={
                name: partial(_layer, files, stored, folder.asked, rounding)
                for name, stored in zip(names, found.values(), strict=True)
            },
            tensors=plain_tensors(files, parts),
            rounding=rounding,
            notes=notes,
        )


def _layer(
    files: WeightFiles,
    stored: Stored,
    asked: ConvertConfig,
    rounding: Rounding,
    out_features: int,
    in_features: int,
) -> Any:
    return KINDS[stored.kind].read(files, stored, asked, rounding, (out_features, in_features))


def _described(folder: ForeignFolder, files: WeightFiles) -> dict[str, Stored]:
    """Return the quantised tensors by name; raises GraftError with all that is not read of them."""
    found, problems = {}, Problems()
    parts: dict[str, list[str]] = {}
    for key in files:
        layer, between, part = key.partition(_PART)
        if between:
            parts.setdefault(f"{layer}.weight", []).append(part)
    described_names = folder.names(name for name in files.metadata if "." in name)
    for own_name, name in described_names.items():
        text = files.metadata[own_name]
        with problems.collecting():
            described = _parsed(name, text)
            kind, attributes = described.get("_type"), described.get("_data")
            if kind == "Tensor":
                continue
            if not isinstance(attributes, dict) or not isinstance(kind, str):
                raise GraftError(f"the metadata of {quoted(name)} describe no tensor of torchao")
            if kind not in KINDS or not name.endswith(".weight"):
                why = _OTHERS.get(kind, "is not read")
                raise GraftError(
                    f"{name} is a {quoted(kind)}, which {why}; graft reads {listed(KINDS)}: "
                    "dequantise it with torchao, or start from the unquantised model"
                )
            found[name] = _stored(name, parts.get(name, []), kind, attributes)
    problems.found[20:] = []
    problems.raise_all(str(folder.folder))
    unnamed = [name for name in parts if name not in found]
    if unnamed:
        raise GraftError(
            f"{folder.folder}: the metadata say nothing of {listed(unnamed, 3)}; download it again"
        )
    return found


def _stored(name: str, parts: list[str], kind: str, attributes: dict[str, Any]) -> Stored:
    entry, prefix = KINDS[kind], name.removesuffix(".weight") + _PART
    strange = [key for key in attributes if key not in entry.attributes]
    strange += [part for part in parts if part not in entry.parts]
    if strange:
        raise GraftError(
            f"{name} has {listed(map(quoted, strange))}, which graft does not read of {kind}: "
            "start from the unquantised model"
        )
    missing = [part for part in entry.needed if part not in parts]
    if missing:
        raise GraftError(f"tensor {prefix}{missing[0]} is missing")
    return Stored(kind, prefix, frozenset(parts), attributes)


def _parsed(name: str, text: str) -> dict[str, Any]:
    try:
        described = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GraftError(f"the metadata of {quoted(name)} are no JSON ({error})") from error
    if not isinstance(described, dict):
        raise GraftError(f"the metadata of {quoted(name)} are no JSON object")
    return described


TORCHAO = TorchaoReader()
