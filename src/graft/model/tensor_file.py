"""Writing a safetensors file tensor by tensor, so that one of them at a time is in memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from graft.errors import GraftError

_CODES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint32: "U32",
    torch.uint8: "U8",
    torch.int64: "I64",
}


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
    path: Path,
    tensors: Sequence[FileTensor],
    on_tensor: Callable[[int, int], None] | None = None,
) -> None:
    """Write the tensors in their order to a temporary name, then rename.

    on_tensor is called after each with (tensors written, all tensors). Raises GraftError when the
    file cannot be written.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as file:
            file.write(_header(tensors))
            for done, tensor in enumerate(tensors, start=1):
                data = tensor.make().detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                assert data.numel() == tensor.bytes, tensor.name
                file.write(data.numpy().data)
                if on_tensor is not None:
                    on_tensor(done, len(tensors))
        os.replace(temporary, path)
    except OSError as error:
        raise GraftError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _header(tensors: Sequence[FileTensor]) -> bytes:
    """Return the length of the JSON as 8 bytes, and the JSON, filled up to a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.bytes
        entries[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
