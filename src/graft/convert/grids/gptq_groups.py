"""Which inputs of a GPTQ layer share a scale: neighbours, or as its g_idx says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graft.convert.folder import check_parts
from graft.convert.grids.affine import neighbours
from graft.errors import GraftError
from graft.model.weight_files import WeightFiles
from graft.text import quoted

_INDICES = (torch.int32, torch.int64, torch.uint32)
_USUAL = tuple(2**power for power in range(3, 15))
"""Group sizes that a row's last, shorter group may belong to."""


@dataclass(frozen=True)
class Groups:
    """The groups of a layer's inputs."""

    of_input: Tensor
    """int64 [inputs]: the group of each."""
    words: str
    """What they are, for the report."""
    note: str = ""


def read_groups(
    files: WeightFiles, name: str, settings: dict[str, Any], groups: int, inputs: int
) -> Groups:
    """Return the groups of a layer; raises GraftError where they are not known."""
    stored = _stored(files, f"{name}.g_idx", groups, inputs)
    by_activation = bool(settings.get("desc_act")) and not settings.get("static_groups")
    note = ""
    if stored is not None and groups > 1 and not bool(stored.any()):
        stored = None  # a g_idx that was never filled in
        note = "g_idx holds zeros alone: groups are of neighbouring inputs, as without it"
    if stored is None:
        if by_activation and groups > 1:
            raise GraftError(
                f"{name}: its inputs are grouped by activation order (desc_act), and its g_idx, "
                "which says how, is missing or holds zeros; download it again, or quantise again "
                "with desc_act false"
            )
        size = _size(name, settings, groups, inputs)
        return Groups(neighbours(inputs, size), f"in groups of {size}", note)
    # The first group's size is that of all but the last where they follow each other.
    size = max(int((stored == 0).sum()), 1)
    if torch.equal(stored, neighbours(inputs, size)):
        return Groups(stored, f"in groups of {size}")
    return Groups(stored, "in activation order")


def _stored(files: WeightFiles, key: str, groups: int, inputs: int) -> Tensor | None:
    if key not in files:
        return None
    name, _, part = key.rpartition(".")
    check_parts(files, name, {part: ((inputs,), _INDICES)})
    stored = files.read_once(key).long()
    if stored.numel() and not 0 <= int(stored.min()) <= int(stored.max()) < groups:
        raise GraftError(
            f"{key} names groups from {int(stored.min())} to {int(stored.max())}, and there are "
            f"{groups}; the checkpoint is damaged: download it again"
        )
    return stored


def _size(name: str, settings: dict[str, Any], groups: int, inputs: int) -> int:
    """Return the inputs of a group of neighbours: as said, unless this layer has its own."""
    if groups == 1:
        return inputs
    given = [settings.get("group_size")]
    for key in ("dynamic", "extra_config"):
        layers = settings.get(key)
        own = layers.get(name) if isinstance(layers, dict) else None
        given.insert(0, own.get("group_size") if isinstance(own, dict) else None)
    for size in given:
        if isinstance(size, int) and size > 0 and math.ceil(inputs / size) == groups:
            return size
    possible = {size for size in _USUAL if math.ceil(inputs / size) == groups}
    if inputs % groups == 0:
        possible.add(inputs // groups)
    if len(possible) == 1:
        return possible.pop()
    found = "are not equal parts" if not possible else f"may be of {sorted(possible)}"
    raise GraftError(
        f"{name} has {groups} groups of its {inputs} inputs, which {found} and are not of "
        f"group_size {quoted(settings.get('group_size'))}; the checkpoint is damaged, or its "
        "settings are those of another: download it again"
    )
