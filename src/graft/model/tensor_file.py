"""Writing a file of tensors one by one, so that one of them at a time is in memory."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from graft.files.write import replacing

_CODES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
WRITABLE = tuple(_CODES)
"""The dtypes that `write_tensor_file` writes; the safetensors library sorts tensors so."""

OnTensor = Callable[[int, int], None]


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the file; `make` gives its data, as a tensor of as many bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensor_file(
    path: Path, tensors: Sequence[FileTensor], on_tensor: OnTensor | None = None
) -> str:
    """Write a safetensors file; see `write_tensors`."""
    return write_tensors(path, tensors, header=_header(tensors), on_tensor=on_tensor)


def write_tensors(
    path: Path,
    tensors: Sequence[FileTensor],
    *,
    header: bytes = b"",
    alignment: int = 1,
    on_tensor: OnTensor | None = None,
) -> str:
    """Write the tensors in their order, as `starts` places them, and return the file's SHA-256.

    on_tensor is called after each with (tensors written, all tensors). Raises GraftError when the
    file cannot be written.
    """
    digest = hashlib.sha256(header)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(header)
        places = zip(tensors, starts(tensors, alignment), strict=True)
        for done, (tensor, start) in enumerate(places, start=1):
            gap = bytes(len(header) + start - file.tell())
            data = tensor.make().detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            assert data.numel() == tensor.bytes, tensor.name
            for part in (gap, data.numpy().data):
                file.write(part)
                digest.update(part)
            if on_tensor is not None:
                on_tensor(done, len(tensors))
    return digest.hexdigest()


def starts(tensors: Sequence[FileTensor], alignment: int = 1) -> list[int]:
    """Return where each tensor begins behind the header: at a multiple of the alignment."""
    places, end = [], 0
    for tensor in tensors:
        places.append(-(-end // alignment) * alignment)
        end = places[-1] + tensor.bytes
    return places


def _header(tensors: Sequence[FileTensor]) -> bytes:
    """Return the length of the JSON as 8 bytes, and the JSON, filled up to a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for tensor, start in zip(tensors, starts(tensors), strict=True):
        entries[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.bytes],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
