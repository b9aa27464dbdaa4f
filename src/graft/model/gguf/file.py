"""A GGUF file's metadata and tensors, memory-mapped."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from graft.errors import GraftError
from graft.files.read import open_regular
from graft.model.gguf.header import Bytes, Header, Place
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
        """Return an unquantised tensor in the dtype of the file."""
        return self.bytes().view(FLOATS[self.type]).view(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """Metadata and tensors of a file by name."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

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
        return float(str(np.float32(self.value(key, float, default))))


def read_gguf(path: Path) -> GgufFile:
    """Read a GGUF file's metadata and memory-map its tensors.

    Raises GraftError when the file is missing, truncated or malformed.
    """
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
