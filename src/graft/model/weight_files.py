"""Reading the tensors of a model folder one at a time, memory-mapped."""

from __future__ import annotations

import copy
import json
import mmap
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from safetensors import safe_open

from graft.errors import GraftError, raise_problems
from graft.files.read import open_regular
from graft.model.weight_sets import (
    INDEX_FILE,
    SINGLE_FILE,
    WeightSet,
    find_weights,
    other_names,
    pickled_weights,
)
from graft.text import quoted
from graft.understood import understood

_PIECE = 16 * 2**20
"""Bytes of two tensors that are compared at once."""
_LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header, a little-endian integer of 64 bits."""

_DAMAGED = "is no readable safetensors file (truncated? copy or download it again)"

_MAP_FLAGS = mmap.MAP_PRIVATE
if sys.platform == "linux":
    # MAP_NORESERVE: else Linux refuses to map a file that is larger than the memory, since a
    # private mapping could be written all over.
    _MAP_FLAGS |= 0x4000


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Its first byte in the file."""
    bytes: int


class WeightFiles:
    """The safetensors files of a folder as one mapping from tensor name to tensor.

    narrow: whether floats of 8 bits and fewer are read, which are nothing without their scales.
    Raises GraftError when there are none, when a file is damaged, when two of them hold different
    tensors under one name, or when only pickled weights are there (those can run code when they
    are loaded, so graft never does).
    """

    def __init__(
        self, folder: Path, single_file: str | None = None, *, narrow: bool = False
    ) -> None:
        self.folder = folder
        self.metadata: dict[str, str] = {}
        """What the files say beside their tensors."""
        self._narrow = narrow
        self._mapped: dict[str, mmap.mmap] = {}
        self._set = WeightSet((single_file,)) if single_file else _weight_set(folder)
        self._entries = self._read_headers(self._set.files)
        if self._set.rival:
            self._check_rival()

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._mapped.clear()  # each mapping lives on in the tensors that were read from it

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading its data."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype without reading its data; raises GraftError for exotic ones."""
        code = self._entries[name].dtype
        if code in _NARROW and not self._narrow:
            raise GraftError(
                f"{self.folder}: tensor {quoted(name)} is {code}, a quantised weight; bring it in "
                f"with: graft convert {self.folder} --dequantise --out NEW_FOLDER"
            )
        if code not in _DTYPES and code not in _NARROW:
            raise GraftError(f"{self.folder}: tensor {quoted(name)} is {code}, which is not read")
        return _DTYPES.get(code) or _NARROW[code]

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, memory-mapped on the CPU: its pages are read when they are touched.

        Writing to it changes this process's copy of the page, not the file. A tensor whose place
        in the file is no multiple of its dtype's size is a copy in memory.
        """
        entry = self._entries[name]
        if entry.file not in self._mapped:
            self._mapped[entry.file] = self._map(entry.file)
        return self._view(name, self._mapped[entry.file], entry.begin)

    def read_once(self, name: str) -> torch.Tensor:
        """Return a tensor whose pages leave memory with it.

        A mapping that stays open keeps what was read of it resident; this one is the tensor's own.
        """
        entry = self._entries[name]
        if not entry.bytes:
            return self.read(name)
        before = entry.begin % mmap.ALLOCATIONGRANULARITY
        mapped = self._map(entry.file, entry.begin - before, before + entry.bytes)
        return self._view(name, mapped, before)

    @property
    def notes(self) -> tuple[str, ...]:
        """What lies in the folder beside these weights and is not read, in words."""
        return self._set.notes

    def place(self, name: str) -> str | None:
        """Return the file in which the folder's index places a tensor."""
        return self._set.places.get(name)

    def named(self, names: Mapping[str, str]) -> WeightFiles:
        """Return the same tensors under other names, without those that get none.

        Raises GraftError where several of one name differ.
        """
        renamed, problems = copy.copy(self), []
        renamed._entries, keys = {}, dict[str, str]()
        for key, name in names.items():
            entry, first = self._entries[key], renamed._entries.setdefault(name, self._entries[key])
            if first is not entry and not self._equal(first, entry):
                problems.append(f"{quoted(keys[name])} and {quoted(key)} are both {quoted(name)}")
            keys.setdefault(name, key)
        raise_problems(problems[:20], f"{self.folder} holds different tensors for one place")
        return renamed

    def equal(self, one: str, other: str) -> bool:
        """Return whether two tensors have the same values, in whichever floating dtypes."""
        first, second = self._entries[one], self._entries[other]
        if first.shape != second.shape:
            return False
        if first.dtype == second.dtype:
            return self._equal(first, second)
        wide = torch.promote_types(self.dtype(one), self.dtype(other))
        rows = zip(self.read_once(one), self.read_once(other), strict=True)
        return all(torch.equal(a.to(wide), b.to(wide)) for a, b in rows)

    def source_dtype(self) -> torch.dtype:
        """Return the dtype that most of the floating tensors have."""
        counts: dict[torch.dtype, int] = {}
        for name in self:
            dtype = self.dtype(name)
            if dtype.is_floating_point:
                counts[dtype] = counts.get(dtype, 0) + 1
        return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)

    def _view(self, name: str, mapped: mmap.mmap, begin: int) -> torch.Tensor:
        dtype, shape = self.dtype(name), self.shape(name)
        count = self._entries[name].bytes // dtype.itemsize
        if not count:
            return torch.empty(shape, dtype=dtype)
        tensor = torch.frombuffer(mapped, dtype=dtype, count=count, offset=begin).view(shape)
        return tensor.clone() if begin % dtype.itemsize else tensor

    def _read_headers(self, files: tuple[str, ...]) -> dict[str, _Entry]:
        entries, problems = dict[str, _Entry](), []
        for file in files:
            for name, entry in self._read_header(file).items():
                first = entries.setdefault(name, entry)
                if first is not entry and not self._equal(first, entry):
                    problems.append(f"{quoted(name)} is in {first.file} and in {file}")
        raise_problems(
            problems[:20], f"{self.folder}: two files hold different tensors; download it again"
        )
        return entries

    def _check_rival(self) -> None:
        """Raise GraftError unless the second set of the folder holds what the first one does."""
        rival = self._read_headers(self._set.rival)
        differing = [
            name
            for name in {**self._entries, **rival}
            if name not in rival or name not in self._entries
        ]
        if not differing:
            differing = [
                name for name, entry in self._entries.items() if not self._equal(entry, rival[name])
            ][:1]
        if differing:
            raise GraftError(
                f"{self.folder} holds two models: {self._set.named}, which Transformers reads, and "
                f"what {INDEX_FILE} names: {self._set.rival_named}. They differ, in "
                f"{quoted(differing[0])} for one, and nothing says which is the newer; move "
                f"{SINGLE_FILE} or {INDEX_FILE} out of the folder"
            )

    def _equal(self, one: _Entry, other: _Entry) -> bool:
        """Return whether two tensors are the same, bit for bit."""
        if (one.dtype, one.shape, one.bytes) != (other.dtype, other.shape, other.bytes):
            return False
        first, second = self._map(one.file), self._map(other.file)
        return all(
            first[one.begin + place : one.begin + place + length]
            == second[other.begin + place : other.begin + place + length]
            for place in range(0, one.bytes, _PIECE)
            for length in [min(_PIECE, one.bytes - place)]
        )

    def _read_header(self, file: str) -> dict[str, _Entry]:
        path = self.folder / file
        with open_regular(path) as opened, understood(path, _DAMAGED):
            # safetensors checks the whole header: that it is one, and that the tensors fill the
            # file without gaps.
            with safe_open(path, framework="numpy") as handle:
                names = list(handle.keys())  # noqa: SIM118  (not a dict)
            length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
            header = json.loads(opened.read(length))
        self.metadata |= header.get("__metadata__") or {}  # MLX writes null
        entries = {}
        for name in names:
            begin, end = header[name]["data_offsets"]
            place = _LENGTH_BYTES + length + begin, end - begin
            dtype, shape = header[name]["dtype"], tuple(header[name]["shape"])
            if dtype == "F4" and shape:  # two to a byte, the first one low
                dtype, shape = "U8", (*shape[:-1], shape[-1] // 2)
            entries[name] = _Entry(file, dtype, shape, *place)
        return entries

    def _map(self, file: str, begin: int = 0, length: int = 0) -> mmap.mmap:
        path = self.folder / file
        try:
            with path.open("rb") as opened:
                access = mmap.PROT_READ | mmap.PROT_WRITE
                return mmap.mmap(opened.fileno(), length, _MAP_FLAGS, access, offset=begin)
        except OSError as error:
            raise GraftError(f"{path} cannot be mapped into memory: {error.strerror}") from error


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NARROW = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


def _weight_set(folder: Path) -> WeightSet:
    found = find_weights(folder)
    if found is not None:
        return found
    pickles = pickled_weights(folder)
    if pickles:
        raise GraftError(
            f"{folder} holds only pickled weights ({', '.join(pickles[:3])}), which can run code "
            f"when loaded; bring them in safely with: graft convert {folder} --out NEW_FOLDER"
        )
    raise GraftError(f"{folder} has no {SINGLE_FILE} (and no {INDEX_FILE}){other_names(folder)}")
