"""Adapters of a model in memory: load several, switch, weight, turn off, merge and unmerge."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from graft.adapters import attach, merge
from graft.adapters.adapted import AdaptedLinear
from graft.adapters.attach import adapted_layers, replace_module
from graft.adapters.merge import MergeError
from graft.api.adapter.files import adapter_folder
from graft.api.run.adopted import base_changes
from graft.errors import GraftError
from graft.formats.dense import DenseFormat
from graft.layers.frozen import FrozenLinear
from graft.model import adapter_files
from graft.model.adapter_files import check_adapter_file
from graft.model.saving import saved_whole
from graft.model.targets import freeze_layers, linear_layers, thaw_layers

_ASIDE = "graft_adapters_set_aside"


def load_adapter(model: PreTrainedModel, adapter: str | Path, name: str | None = None) -> str:
    """Load an adapter into a model that `load` returned; it is on, beside those that are.

    adapter: a run, or a folder that PEFT or graft wrote. name: what it is called from here on, by
    default its folder's name. Returns the name. Raises GraftError for an adapter that does not fit
    the model, before that is changed, and for a name that is taken.
    """
    folder = adapter_folder(adapter)
    changes = base_changes(Path(adapter))
    if changes:
        raise GraftError(
            f"{adapter} was adopted with tensors of its own beside the adapter ({len(changes)}, "
            f"such as {next(iter(changes))}); it cannot be put on another base"
        )
    attach.check_unmerged(model)
    check_adapter_file(folder)
    name = name or _free_name(Path(adapter), adapter_names(model))
    before = active_adapters(model)
    _take_back(model)
    try:
        freeze_layers(model, linear_layers(model))
        adapter_files.load_adapter(model, folder, name)
    except GraftError:
        set_adapters(model, before)
        raise
    set_adapters(model, {**before, name: 1.0})
    saved_whole(model)
    return name


def adapter_names(model: PreTrainedModel) -> list[str]:
    """Return the names of a model's adapters, on or off, in the order in which they came."""
    names = attach.adapter_names(model)
    for layer in _aside(model).values():
        names += [name for name in layer.adapters if name not in names]
    return names


def active_adapters(model: PreTrainedModel) -> dict[str, float]:
    """Return the adapters that are on, each with its weight."""
    found: dict[str, float] = {}
    for _, layer in adapted_layers(model):
        found |= {name: layer.weight_of(name) for name in layer.active}
    return found


def set_adapters(model: PreTrainedModel, names: Sequence[str] | Mapping[str, float]) -> None:
    """Turn exactly these adapters on; their updates are added, each times its weight.

    None at all is the model without adapters, bit for bit what it was: the layers that were plain
    modules are those again. Raises GraftError for a name that there is not, for a weight other
    than 1 of an adapter that moves quantised weights, and while adapters are merged in memory.
    """
    attach.check_unmerged(model)
    _take_back(model)
    try:
        attach.activate_adapters(model, names)
    finally:
        _put_aside(model)


@contextmanager
def no_adapters(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Turn all adapters off for a block: `with graft.no_adapters(model): ...`."""
    before = active_adapters(model)
    set_adapters(model, [])
    try:
        yield model
    finally:
        set_adapters(model, before)


def remove_adapter(model: PreTrainedModel, name: str) -> None:
    """Take an adapter out of a model; raises GraftError for a name that there is not."""
    _take_back(model)
    try:
        attach.remove_adapter(model, name)
    finally:
        _put_aside(model)


def merge_in_memory(
    model: PreTrainedModel, dtype: torch.dtype | None = None
) -> dict[str, MergeError]:
    """Let a model compute with its adapters merged into the weights; `unmerge` undoes it.

    Returns each layer's error. Adapters that move the grid of quantised weights merge exactly; any
    other becomes dense weights in `dtype` (default: what the model computes in), beside the
    weights that it was trained on, which stay. A model of the Llama family whose adapters are
    merged is decoded natively. Raises GraftError when no adapter is on.
    """
    attach.check_unmerged(model)
    layers = [layer for _, layer in adapted_layers(model) if layer.active]
    if not layers:
        raise GraftError("no adapter is on: there is nothing to merge")
    exact = all(layer.moves_grid_only() for layer in layers)
    dense = DenseFormat(str(dtype or model.dtype).removeprefix("torch."))
    return merge.merge_in_memory(model, None if exact else dense)


def unmerge(model: PreTrainedModel) -> None:
    """Undo `merge_in_memory`: weights, adapters and logits are the very bits of before."""
    merge.unmerge(model)


def _free_name(path: Path, taken: Sequence[str]) -> str:
    """Return a folder's name as a module may be called, with a number where it is taken."""
    name = re.sub(r"[^\w-]", "_", path.resolve().name) or "adapter"
    number, free = 1, name
    while free in taken or free in dir(torch.nn.ModuleDict()):
        number += 1
        free = f"{name}_{number}"
    return free


def _aside(model: PreTrainedModel) -> dict[str, AdaptedLinear]:
    """Return the layers that are set aside while plain modules stand in their places."""
    found: dict[str, AdaptedLinear] = model.__dict__.setdefault(_ASIDE, {})
    return found


def _put_aside(model: PreTrainedModel) -> None:
    """Where no adapter is on, put the plain modules back in their places."""
    if active_adapters(model):
        return
    for name, layer in list(adapted_layers(model)):
        if layer.base.stands_for:
            _aside(model)[name] = layer
            replace_module(model, name, layer.base)
    thaw_layers(model)


def _take_back(model: PreTrainedModel) -> None:
    """Undo `_put_aside`: the layers take their weights from the plain modules, on any device."""
    aside = _aside(model)
    freeze_layers(model, aside)
    for name, layer in aside.items():
        frozen = model.get_submodule(name)
        assert isinstance(frozen, FrozenLinear)
        layer.base = frozen
        layer.adapters.to(next(frozen.parameters()).device)
        replace_module(model, name, layer)
    aside.clear()
