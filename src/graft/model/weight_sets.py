"""Which files of a folder hold its weights, where a folder holds more than one set of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from graft.errors import GraftError, raise_problems
from graft.files.read import LARGE_JSON_BYTES, read_typed
from graft.text import quoted

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED_FILE = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

_OTHER_STATES = ("optimizer.", "scheduler.", "training_args.", "rng_state", "scaler.")
"""Beginnings of the names of pickles that training programs keep beside the weights."""


@dataclass(frozen=True)
class WeightSet:
    """The files that Transformers reads the weights of a folder from."""

    files: tuple[str, ...]
    rival: tuple[str, ...] = ()
    """A second whole set, which must hold the very same: nothing says which is the newer."""
    places: Mapping[str, str] = field(default_factory=dict)
    """The file of each tensor, as the index says, where the set has one."""
    notes: tuple[str, ...] = ()
    """What lies beside it and is not read, in words."""

    @property
    def named(self) -> str:
        """The files in words."""
        return _in_words(self.files)

    @property
    def rival_named(self) -> str:
        """The files of the second set in words."""
        return _in_words(self.rival)


def find_weights(folder: Path) -> WeightSet | None:
    """Return the safetensors files of a folder, chosen as Transformers does, or None for none.

    A model.safetensors goes before an index. Raises GraftError for an index that is damaged, or
    names files that are not there.
    """
    found = _find(folder, SINGLE_FILE, INDEX_FILE)
    if found is None:
        return None
    read = {*found.files, *found.rival}
    beside = [name for name in other_safetensors(folder) if name not in read]
    return WeightSet(
        found.files,
        found.rival,
        found.places,
        (*found.notes, *_beside([*beside, *pickled_weights(folder)], folder)),
    )


def whole_set(folder: Path) -> bool:
    """Return whether a folder holds a set of safetensors files that is whole."""
    try:
        return find_weights(folder) is not None
    except GraftError:
        return False


def find_pickles(folder: Path) -> WeightSet | None:
    """Return the pickled files of a folder as `find_weights` does."""
    return _find(folder, PICKLED_FILE, PICKLED_INDEX)


def pickled_weights(folder: Path) -> list[str]:
    """Return the names of the pickled files of a folder that may hold weights."""
    return sorted(
        {
            path.name
            for pattern in PICKLES
            for path in folder.glob(pattern)
            if not path.name.startswith((*_OTHER_STATES, "adapter_"))
        }
    )


def other_safetensors(folder: Path) -> list[str]:
    """Return the names of the safetensors files of a folder that are no adapter's."""
    found = (path.name for path in folder.glob("*.safetensors"))
    return sorted(name for name in found if not name.startswith("adapter_"))


def other_names(folder: Path) -> str:
    """Return in words which safetensors files a folder holds that are no set, or an empty text."""
    found = other_safetensors(folder)
    return f"; it holds {_in_words(found)}, which no index names" if found else ""


def _find(folder: Path, single: str, index: str) -> WeightSet | None:
    has_single, has_index = os.path.isfile(folder / single), os.path.isfile(folder / index)
    if not has_index:
        return WeightSet((single,)) if has_single else None
    if not has_single:
        places = _places(folder / index)
        raise_problems(_missing(folder, places), str(folder / index))
        return WeightSet(_files(places), places=places)
    places = _places(folder / index)
    files = _files(places)
    if files == (single,) or not _missing(folder, places):
        return WeightSet((single,), () if files == (single,) else files)
    # The index is what an earlier save left behind.
    note = f"{index} in {folder} names files that are not there; {single} is read alone"
    return WeightSet((single,), notes=(note,))


@dataclass(frozen=True)
class _Index:
    """What an index file says."""

    weight_map: Mapping[str, str] = field(default_factory=dict)
    """The file of each tensor."""


def _places(index: Path) -> Mapping[str, str]:
    places = read_typed(index, _Index, LARGE_JSON_BYTES).weight_map
    if not places:
        raise GraftError(f"{index} has no weight_map; download it again")
    return places


def _files(places: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(sorted(set(places.values())))


def _missing(folder: Path, places: Mapping[str, str]) -> list[str]:
    return [
        f"{quoted(file)} is named there but not in the folder; download it again"
        for file in _files(places)
        if Path(file).name != file or not os.path.isfile(folder / file)
    ]


def _beside(names: list[str], folder: Path) -> tuple[str, ...]:
    return (f"not read in {folder}: {_in_words(names)}",) if names else ()


def _in_words(files: Iterable[str]) -> str:
    first, *others = files
    if len(others) > 2:
        return f"{first} and {len(others)} more like it"
    return ", ".join([first, *others])
