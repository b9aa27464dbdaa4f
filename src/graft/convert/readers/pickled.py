"""Folders with pickled PyTorch weights, read without running what is in them.

torch.load(weights_only=True) rebuilds tensors and plain containers, and refuses every other object.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graft.convert.base import Reader
from graft.convert.config import ConvertConfig
from graft.convert.folder import ForeignFolder, open_folder
from graft.convert.source import PlainTensor, Source
from graft.errors import GraftError
from graft.files.read import open_regular
from graft.model.folder import find_folder
from graft.model.weight_sets import (
    PICKLED_FILE,
    PICKLED_INDEX,
    PICKLES,
    WeightSet,
    find_pickles,
    pickled_weights,
)
from graft.text import quoted
from graft.understood import understood

_INSIDE = ("state_dict", "model", "module")
"""Keys under which training programs keep the weights beside other things."""
_WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before the name of every tensor."""
_ZIP = b"PK\x03\x04"
"""Begins every file that torch takes for an archive."""


class PickledReader(Reader):
    """Folders and single files of torch.save."""

    def reads_file(self, file: Path) -> bool:
        """Return whether it is there, and called as pickled weights are."""
        return file.is_file() and f"*{file.suffix}" in PICKLES

    def open_file(self, file: Path, asked: ConvertConfig) -> tuple[Source, Path]:
        """Return what is in the file; config.json and the tokenizer lie beside it."""
        folder = find_folder(str(file.parent))
        found = open_folder(folder, asked)
        source = pickled_source(found, file.name)
        source.notes.extend(found.notes)
        return source, folder

    def reads_folder(self, folder: ForeignFolder) -> bool:
        """Return whether its weights are pickled, quantised or not."""
        return folder.is_pickled

    def open_folder(self, folder: ForeignFolder) -> Source:
        """Return what is in the folder; raises GraftError for anything but plain tensors."""
        return pickled_source(folder)


def pickled_source(folder: ForeignFolder, file: str | None = None) -> Source:
    """Return what is in the pickled files of a folder, or in the one that is named.

    Raises GraftError for a file that holds anything but tensors and plain containers.
    """
    if folder.settings:
        raise GraftError(
            f"{folder.folder} is quantised by another tool and pickled; graft reads such weights "
            "from safetensors only: look for the folder in that form"
        )
    chosen = WeightSet((file,)) if file else _files(folder.folder)
    folder.notes.extend(chosen.notes)
    found = _read(folder.folder, chosen.files)
    if chosen.rival:
        _check_rival(folder.folder, chosen, found)
    tensors, keys = dict[str, PlainTensor](), dict[str, str]()
    for key, name in folder.names(found).items():
        if name in tensors and not _equal(tensors[name], found[key]):
            raise GraftError(
                f"{folder.folder} holds different tensors for one place: {quoted(keys[name])} and "
                f"{quoted(key)} are both {quoted(name)}"
            )
        tensors.setdefault(name, found[key])
        keys.setdefault(name, key)
    return Source("PyTorch, pickled", folder.skeleton(len(found)), {}, tensors)


def _files(folder: Path) -> WeightSet:
    chosen = find_pickles(folder)
    if chosen is not None:
        return chosen
    found = pickled_weights(folder)
    if len(found) != 1:
        raise GraftError(
            f"{folder} holds {len(found)} pickled files ({', '.join(found[:4])}) and no "
            f"{PICKLED_INDEX}; name the one with the weights instead of the folder"
        )
    return WeightSet((found[0],))


def _read(folder: Path, files: Iterable[str]) -> dict[str, PlainTensor]:
    """Return the tensors of the files; raises GraftError where two of them differ in one."""
    shards, tensors, places = _Shards(folder), dict[str, PlainTensor](), dict[str, str]()
    for file in files:
        for key, tensor in shards.read(file).items():
            make = partial(shards.tensor, file, key)
            plain = PlainTensor(tuple(tensor.shape), tensor.dtype, make)
            if key in tensors and not _equal(tensors[key], plain):
                raise GraftError(
                    f"{folder}: two files hold different tensors; download it again: {quoted(key)} "
                    f"is in {places[key]} and in {file}"
                )
            tensors.setdefault(key, plain)
            places.setdefault(key, file)
    return tensors


def _check_rival(folder: Path, chosen: WeightSet, found: Mapping[str, PlainTensor]) -> None:
    rival = _read(folder, chosen.rival)
    for key in {**found, **rival}:
        if key not in found or key not in rival or not _equal(found[key], rival[key]):
            raise GraftError(
                f"{folder} holds two models: {chosen.named}, which Transformers reads, and what "
                f"{PICKLED_INDEX} names: {chosen.rival_named}. They differ, in {quoted(key)} for "
                f"one, and nothing says which is the newer; move {PICKLED_FILE} or {PICKLED_INDEX} "
                "out of the folder"
            )


def _equal(one: PlainTensor, other: PlainTensor) -> bool:
    return (one.shape, one.dtype) == (other.shape, other.dtype) and torch.equal(
        one.make(), other.make()
    )


class _Shards:
    """The pickled files of a folder, the last one that was asked for in memory (or mapped)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def tensor(self, file: str, name: str) -> Tensor:
        return self.read(file)[name]

    def read(self, file: str) -> dict[str, Tensor]:
        if self._last[0] != file:
            self._last = ("", {})  # leaves memory before the next one comes
            self._last = (file, pickled_tensors(self._folder / file))
        return self._last[1]


def unpickled(path: Path) -> Any:
    """Return what is in a pickled file; raises GraftError unless it is tensors and containers."""
    with understood(path, "is no readable PyTorch file (download it again)"):
        # Files of before PyTorch 1.6 are no zip archives and cannot be mapped.
        zipped = _check_archive(path)
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except pickle.UnpicklingError as error:
            raise GraftError(
                f"{path} is refused: it holds more than tensors and plain containers, or is "
                f"damaged, and unpickling it could run code ({_reason(error)}); ask whoever made "
                "it for safetensors"
            ) from error


def pickled_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a pickled file by name; raises GraftError where there are none."""
    found = unpickled(path)
    for key in _INSIDE:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        raise GraftError(f"{path} holds a {type(found).__name__}; expected tensors by name")
    tensors = {
        name: tensor
        for name, tensor in found.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }
    if not tensors:
        raise GraftError(f"{path} holds no tensors by name")
    for name, tensor in tensors.items():
        check_dense(path, name, tensor)
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def check_dense(path: Path, name: str, tensor: Tensor) -> None:
    """Raise GraftError for a tensor that is not an array of numbers in memory."""
    if tensor.layout is not torch.strided or tensor.is_meta:
        kind = "without data" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
        raise GraftError(
            f"{path}: {quoted(name)} is {kind}; expected a dense tensor: save the weights again"
        )


def _check_archive(path: Path) -> bool:
    """Return whether a file is a zip archive, as torch takes it.

    Raises GraftError when more is in it than its size: torch would decompress it into memory.
    """
    with open_regular(path) as file:
        if file.read(len(_ZIP)) != _ZIP:
            return False
        size = file.seek(0, os.SEEK_END)
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    packed = [entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise GraftError(
            f"{path} is refused: {quoted(packed[0].filename)} in it is compressed, which "
            "torch.save never does; ask whoever made it for safetensors"
        )
    inside = sum(entry.file_size for entry in entries)
    if inside > size:
        raise GraftError(
            f"{path} is refused: it has {size:,} bytes and says that {inside:,} are in it; ask "
            "whoever made it for safetensors"
        )
    return True


def _reason(error: Exception) -> str:
    """Return the sentence of torch's long message that names what was found."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Unsupported" in line or "GLOBAL" in line]
    return (telling or lines or [type(error).__name__])[0][:200]


PICKLED = PickledReader()
