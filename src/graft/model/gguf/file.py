"""A GGUF file's metadata and tensors, memory-mapped; a file in parts is read as one."""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf.quants
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from graft.errors import GraftError
from graft.files.read import open_regular
from graft.model.gguf.header import Array, Bytes, Header, Place
from graft.model.gguf.parts import is_split, join_parts, part_files
from graft.text import quoted, reason

FLOATS = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
"""The unquantised types, by the dtype that holds them."""

_PLAIN = {
    GGMLQuantizationType.F64: np.float64,
    GGMLQuantizationType.F32: np.float32,
    GGMLQuantizationType.F16: np.float16,
}
"""The types that NumPy has a dtype for."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file; its data stays memory-mapped until it is asked for."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    """As PyTorch counts: rows first."""
    data: npt.NDArray[Any]

    def bytes(self) -> Tensor:
        """Return a copy of the data, uint8 [rows, bytes of a row]."""
        return torch.from_numpy(np.array(self.data).view(np.uint8))

    def dense(self) -> Tensor:
        """Return an unquantised tensor in the dtype of the file, a quantised one in float32.

        For types of `is_read` alone.
        """
        if self.type in FLOATS:
            return self.bytes().view(FLOATS[self.type]).view(self.shape)
        if self.type is GGMLQuantizationType.Q1_0:
            return _signs(self.bytes()).view(self.shape)
        weights = gguf.quants.dequantize(np.asarray(self.data), self.type)
        return torch.from_numpy(weights).view(self.shape)


def _signs(rows: Tensor) -> Tensor:
    """Return what Q1_0 stands for, which gguf does not dequantise: blocks of a scale and 128 signs.

    w = d where the bit is set, else -d; bit j of a byte is its (j + 1)th weight.
    """
    blocks = rows.view(-1, gguf.GGML_QUANT_SIZES[GGMLQuantizationType.Q1_0][1])
    scales = blocks[:, :2].contiguous().view(torch.float16).float()
    bits = blocks[:, 2:].unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1
    return torch.where(bits.flatten(1).bool(), scales, -scales)


def is_read(kind: GGMLQuantizationType) -> bool:
    """Return whether tensors of a type can be had as floats."""
    if kind in FLOATS or kind is GGMLQuantizationType.Q1_0:
        return True
    _, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


@dataclass(frozen=True)
class GgufFile:
    """Metadata and tensors of a file by name."""

    path: Path
    metadata: Mapping[str, Any]
    """Numbers and strings as Python's, arrays as `Array`."""
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """What llama.cpp calls the model's kind; raises GraftError where that is not said."""
        found: str = self.value("general.architecture", str)
        return found

    def value(self, key: str, kind: type, default: Any = None) -> Any:
        """Return a metadata value; raises GraftError when it is missing or not of that type."""
        found = self.metadata.get(key, default)
        # Python counts a bool as an int; GGUF does not.
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
            raise GraftError(
                f"{self.path}: metadata {key} is {quoted(found)}; expected {kind.__name__}; export "
                "the file again"
            )
        return found

    def number(self, key: str, default: float | None = None) -> float:
        """Return a float32 metadata value as the shortest decimal that it is the float32 of."""
        found = float(str(np.float32(self.value(key, float, default))))
        if not math.isfinite(found):
            raise GraftError(f"{self.path}: metadata {key} is {found}; expected a finite number")
        return found

    def texts(self, key: str) -> list[str] | None:
        """Return an array of strings; None where there is none; raises GraftError for another."""
        return self._elements(key, Array.texts)

    def numbers(self, key: str) -> list[Any] | None:
        """Return an array of numbers; None where there is none; raises GraftError for another."""
        return self._elements(key, Array.numbers)

    def _elements(self, key: str, read: Any) -> list[Any] | None:
        found = self.metadata.get(key)
        if found is None:
            return None
        if not isinstance(found, Array):
            raise GraftError(f"{self.path}: metadata {key} is {quoted(found)}; expected an array")
        try:
            elements: list[Any] = read(found)
        except ValueError as error:
            raise GraftError(f"{self.path}: metadata {key}: {reason(error)}") from error
        return elements

    def types(self) -> dict[str, int]:
        """Return the number of tensors of each type, the most frequent first."""
        return dict(Counter(tensor.type.name for tensor in self.tensors.values()).most_common())


def read_gguf(path: Path) -> GgufFile:
    """Read a GGUF file's metadata and memory-map its tensors; of a file in parts, all of them.

    Raises GraftError when the file or a part of it is missing, truncated or malformed.
    """
    file = _read_one(path)
    if not is_split(path, file.metadata, len(file.tensors)):
        return file
    files = part_files(path, file.metadata)
    parts = [file if one == path else _read_one(one) for one in files]
    metadata = join_parts([(part.path, part.metadata, tuple(part.tensors)) for part in parts])
    return GgufFile(path, metadata, {n: t for part in parts for n, t in part.tensors.items()})


def _read_one(path: Path) -> GgufFile:
    if not path.exists():
        raise GraftError(f"{path}: no such file")
    open_regular(path).close()
    try:
        mapped = np.memmap(path, np.uint8, "r")
        header = Header(path, mapped)
    except (ValueError, struct.error) as error:  # UnicodeDecodeError is a ValueError
        raise GraftError(
            f"{path}: not a complete GGUF file ({reason(error)}); export or download it again"
        ) from error
    tensors = {name: _tensor(mapped, place) for name, place in header.tensors.items()}
    return GgufFile(path, header.metadata, tensors)


def _tensor(mapped: Bytes, place: Place) -> GgufTensor:
    """Return a view of a tensor as gguf's functions take it: numbers, or blocks as bytes."""
    data = mapped[place.begin : place.begin + place.bytes]
    dtype = _PLAIN.get(place.type)
    if dtype is None:
        data = data.reshape(*place.shape[:-1], -1) if place.bytes else data
    else:
        data = np.frombuffer(data, dtype).reshape(place.shape)
    return GgufTensor(place.type, place.shape, data)
