"""A GGUF file's metadata and tensors, memory-mapped."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from graft.errors import GraftError

FLOATS = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
"""The unquantised types, by the dtype that holds them."""

_CORRUPT = (ValueError, IndexError, KeyError, OverflowError, MemoryError, struct.error)
"""What gguf's reader raises on a malformed file (UnicodeDecodeError is a ValueError)."""


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
                f"{self.path}: metadata {key} is {found!r}; expected {kind.__name__}; export the "
                "file again"
            )
        return found

    def number(self, key: str, default: float | None = None) -> float:
        """Return a float32 metadata value as the shortest decimal that it is the float32 of."""
        return float(str(np.float32(self.value(key, float, default))))


def read_gguf(path: Path) -> GgufFile:
    """Read a GGUF file's metadata and memory-map its tensors.

    Raises GraftError when the file is missing, truncated or malformed.
    """
    if not path.is_file():
        raise GraftError(f"{path}: no such file")
    try:
        with np.errstate(over="ignore"):  # sizes of a damaged file
            reader = gguf.GGUFReader(path)
            metadata = {name: field.contents() for name, field in reader.fields.items()}
    except _CORRUPT as error:
        raise GraftError(
            f"{path}: not a complete GGUF file ({error}); export or download it again"
        ) from error
    tensors = {
        tensor.name: GgufTensor(
            tensor.tensor_type, tuple(int(size) for size in reversed(tensor.shape)), tensor.data
        )
        for tensor in reader.tensors
    }
    return GgufFile(path, metadata, tensors)
