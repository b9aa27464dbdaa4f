"""Reading the tensors of a model folder one at a time, memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from graft.errors import GraftError, raise_problems

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class WeightFiles:
    """The safetensors files of a folder as one mapping from tensor name to tensor.

    Raises GraftError when there are none, when a file is damaged, or when only pickled weights are
    there (those can run code when they are loaded, so graft never does).
    """

    def __init__(self, folder: Path, single_file: str | None = None) -> None:
        self.folder = folder
        self._open: dict[str, safe_open] = {}
        self._file_of: dict[str, str] = {}
        for file in [single_file] if single_file else _weight_files(folder):
            handle = self._handle(file)
            for name in handle.keys():  # noqa: SIM118  (not a dict)
                self._file_of[name] = file

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading its data."""
        return tuple(self._handle(self._file_of[name]).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype without reading its data; raises GraftError for exotic ones."""
        code = self._handle(self._file_of[name]).get_slice(name).get_dtype()
        if code not in _DTYPES:
            raise GraftError(f"{self.folder}: tensor {name} has dtype {code}, which is not read")
        return _DTYPES[code]

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, memory-mapped on the CPU."""
        tensor: torch.Tensor = self._handle(self._file_of[name]).get_tensor(name)
        return tensor

    def read_once(self, name: str) -> torch.Tensor:
        """Return a tensor whose pages leave memory with it.

        A mapping that stays open keeps what was read of it resident; this one is the tensor's own.
        """
        with self._map(self._file_of[name]) as handle:
            tensor: torch.Tensor = handle.get_tensor(name)
            return tensor

    def source_dtype(self) -> torch.dtype:
        """Return the dtype that most of the floating tensors have."""
        counts: dict[torch.dtype, int] = {}
        for name in self:
            dtype = self.dtype(name)
            if dtype.is_floating_point:
                counts[dtype] = counts.get(dtype, 0) + 1
        return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)

    def _handle(self, file: str) -> safe_open:
        if file not in self._open:
            self._open[file] = self._map(file)
        return self._open[file]

    def _map(self, file: str) -> safe_open:
        try:
            return safe_open(self.folder / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise GraftError(
                f"{self.folder / file} is no readable safetensors file: {error}; "
                "it may be truncated: copy or download it again"
            ) from error


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _weight_files(folder: Path) -> list[str]:
    if (folder / INDEX_FILE).is_file():
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise GraftError(f"{folder / INDEX_FILE} has no weight_map; download it again")
        files = sorted({str(file) for file in weight_map.values()})
        problems = [
            f"{file} is named there but not in the folder; download it again"
            for file in files
            if Path(file).name != file or not (folder / file).is_file()
        ]
        raise_problems(problems, str(folder / INDEX_FILE))
        return files
    if (folder / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise GraftError(
            f"{folder} holds only pickled weights ({', '.join(pickles[:3])}), which can run code "
            "when loaded; convert them: load with torch.load(..., weights_only=True) and save with "
            "safetensors.torch.save_file as model.safetensors"
        )
    raise GraftError(f"{folder} has no {SINGLE_FILE} (and no {INDEX_FILE})")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raises GraftError when it holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GraftError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise GraftError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise GraftError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value
