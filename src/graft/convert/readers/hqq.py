"""HQQ folders: hqq's own qmodel.pt, and the safetensors that it and Transformers write.

A layer is W_q beside what describes it: values in the pickle, tensors of one value in safetensors,
of which a text is the numbers of its letters. `hqq_layers` has the layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from graft.convert.base import Reader
from graft.convert.config import ConvertConfig
from graft.convert.folder import ForeignFolder, open_folder, plain_tensors
from graft.convert.grids.hqq_layers import hqq_layer
from graft.convert.grids.integers import Rounding
from graft.convert.labels.settings import unread
from graft.convert.readers.pickled import check_dense, unpickled
from graft.convert.source import PlainTensor, Source
from graft.errors import GraftError
from graft.model.folder import find_folder
from graft.model.weight_files import WeightFiles
from graft.text import quoted

_PICKLE = "qmodel.pt"
_CODES = ".W_q"
_TEXTS = ("packing", "unpack_view_dtype", "compute_dtype")
_TENSORS = ("W_q", "scale", "zero", "zero_scale")
_VALUES = (
    *("nbits", "group_size", "shape", "axis", "view_as_float", "quant_scale", "quant_zero"),
    *("offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize"),
    *("round_zero",),
)
_PARTS = (*_TENSORS, *_TEXTS, *_VALUES)
_KNOWN = {"quant_method", "quant_config", "skip_modules"}
_LONGEST = 100
"""Letters that a text of a layer may have."""


class HqqReader(Reader):
    """Folders of hqq, and of Transformers with it."""

    def reads_file(self, file: Path) -> bool:
        """Return whether it is called as hqq calls its pickle."""
        return file.is_file() and file.name == _PICKLE

    def open_file(self, file: Path, asked: ConvertConfig) -> tuple[Source, Path]:
        """Return what is in the file; config.json and the tokenizer lie beside it."""
        folder = find_folder(str(file.parent))
        return _pickled_source(open_folder(folder, asked)), folder

    def reads_folder(self, folder: ForeignFolder) -> bool:
        """Return whether the settings say so, or there are none and a layer has W_q."""
        if folder.is_pickled:
            return (folder.folder / _PICKLE).is_file()
        if folder.settings:
            return folder.settings.get("quant_method") == "hqq"
        stored = any(folder.folder.glob("*.safetensors"))
        return stored and any(key.endswith(_CODES) for key in folder.files())

    def open_folder(self, folder: ForeignFolder) -> Source:
        """Return what is in the folder; raises GraftError for what hqq does not write."""
        if folder.is_pickled:
            return _pickled_source(folder)
        files, rounding = folder.weights(), Rounding()
        names = [key.removesuffix(_CODES) for key in files if key.endswith(_CODES)]
        parts = [f"{name}.{part}" for name in names for part in _PARTS]
        return Source(
            kind="HQQ",
            model=folder.skeleton(len(files)),
            layers={
                name: partial(hqq_layer, name, _Encoded(files, name), folder.asked, rounding)
                for name in names
            },
            tensors=plain_tensors(files, parts),
            rounding=rounding,
            notes=unread(folder, _KNOWN),
        )


class _Encoded(Mapping[str, Any]):
    """What describes a layer in safetensors; each value is read when it is asked for."""

    def __init__(self, files: WeightFiles, name: str) -> None:
        self._files, self._name = files, name

    def __getitem__(self, part: str) -> Any:
        key = f"{self._name}.{part}"
        if key not in self._files or part not in _PARTS:
            raise KeyError(part)
        if part in _TENSORS:
            return self._files.read_once(key)
        values: list[Any] = self._files.read_once(key).reshape(-1)[:_LONGEST].tolist()
        if part in _TEXTS:
            return "".join(chr(int(value)) for value in values)
        if part == "shape":
            return tuple(values)
        if len(values) != 1:
            raise GraftError(f"{key} has {len(values)} values; expected one")
        return values[0]

    def __iter__(self) -> Iterator[str]:
        return (part for part in _PARTS if f"{self._name}.{part}" in self._files)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _pickled_source(folder: ForeignFolder) -> Source:
    """Return what is in qmodel.pt: of each module its tensors, or a layer and what describes it."""
    path, rounding = folder.folder / _PICKLE, Rounding()
    found = unpickled(path)
    if not isinstance(found, dict) or not all(isinstance(part, dict) for part in found.values()):
        raise GraftError(f"{path} holds a {type(found).__name__}; expected modules by name")
    layers, tensors = {}, {}
    for name, state in found.items():
        described = state
        if "W_q" in state:
            described = {key: value for key, value in state.items() if key != "bias"}
            if isinstance(state.get("meta"), dict):  # as older releases nest them
                described = described | state["meta"]
            layers[name] = partial(hqq_layer, name, described, folder.asked, rounding)
            described = {"bias": state.get("bias")}
        for part, tensor in described.items():
            if isinstance(tensor, Tensor):
                check_dense(path, f"{name}.{part}", tensor)
                make = partial(_given, tensor)
                tensors[f"{name}.{part}"] = PlainTensor(tuple(tensor.shape), tensor.dtype, make)
            elif tensor is not None:
                raise GraftError(f"{path}: {quoted(f'{name}.{part}')} is no tensor")
    model = folder.skeleton(len(tensors) + len(layers))
    return Source("HQQ, pickled", model, layers, tensors, rounding)


def _given(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.is_contiguous() else tensor.detach().contiguous()


HQQ = HqqReader()
