"""Attaching adapters to the frozen layers of a model: add, activate, remove, find."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from graft.adapters.adapted import AdaptedLinear
from graft.adapters.base import Adapter
from graft.adapters.config import AdapterConfig
from graft.adapters.registry import method_of
from graft.errors import GraftError, did_you_mean, raise_problems
from graft.layers.frozen import FrozenLinear


def make_adapter(layer: FrozenLinear, config: AdapterConfig) -> Adapter:
    """Return a fresh adapter for a layer.

    Raises GraftError when the layer's format cannot take that adapter.
    """
    kind = method_of(config).adapter
    if kind is None:
        raise GraftError(f"method {config.method!r} attaches no adapter")
    return kind.from_layer(layer, config)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """Yield every adapted layer by the name of the layer that it stands for."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            yield name, module


def frozen_layers(model: nn.Module) -> Iterator[tuple[str, FrozenLinear]]:
    """Yield every frozen layer by name, also those inside adapted layers."""
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear):
            yield name.removesuffix(".base"), module


def attach_adapter(
    model: nn.Module,
    layer_names: Sequence[str],
    config: AdapterConfig,
    name: str = "default",
    ranks: Mapping[str, int] | None = None,
) -> None:
    """Add an adapter called `name` to the named frozen layers and activate it.

    ranks: of the update of each layer that has another rank than the configuration's, with the same
    scaling; a layer of rank 0 gets no adapter. The random matrices are drawn in the order of the
    names from torch's global generator. Raises GraftError, with every layer that is at fault,
    before any layer is changed.
    """
    layers: dict[str, FrozenLinear] = dict(frozen_layers(model))
    problems, made, ranks = [], {}, ranks or {}
    if not name or "." in name or name in dir(nn.ModuleDict()):
        problems.append(
            f"{name!r} cannot be an adapter's name, which becomes a module's; rename it"
        )
    taken = {layer for layer, adapted in adapted_layers(model) if name in adapted.adapters}
    for layer_name in layer_names:
        rank = ranks.get(layer_name, config.update_rank)
        if layer_name not in layers:
            problems.append(f"{layer_name} is not a frozen linear layer")
        elif layer_name in taken:
            problems.append(f"{layer_name} already has an adapter named {name!r}; remove it first")
        elif rank:
            own = config if layer_name not in ranks else config.with_rank(rank)
            try:
                made[layer_name] = make_adapter(layers[layer_name], own)
            except GraftError as error:
                problems.append(f"{layer_name}: {error}")
    raise_problems(problems, f"cannot attach adapter {name!r}")
    for layer_name, adapter in made.items():
        adapter.train(layers[layer_name].training)
        adapted_layer(model, layer_name).add(name, adapter)


def adapted_layer(model: nn.Module, layer_name: str) -> AdaptedLinear:
    """Return the adapted layer of that name, wrapping the frozen layer when it is bare."""
    module = model.get_submodule(layer_name)
    if isinstance(module, FrozenLinear):
        adapted = AdaptedLinear(module)
        replace_module(model, layer_name, adapted)
        return adapted
    assert isinstance(module, AdaptedLinear)
    return module


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one called `name`, in the same training mode."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    module.train(parent.training)
    setattr(parent, child, module)


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of all adapters, in the order in which they were first added."""
    names: dict[str, None] = {}
    for _, layer in adapted_layers(model):
        names.update(dict.fromkeys(layer.adapters))
    return list(names)


def activate_adapters(model: nn.Module, names: Sequence[str] | Mapping[str, float]) -> None:
    """Make exactly these adapters active, in this order; none restores the base's outputs.

    With a mapping each one's update is multiplied by its weight. Raises GraftError for a name that
    no layer has, for a weight other than 1 of an adapter that moves a grid, whose moves are
    rounded, and for a model whose adapters are merged in memory.
    """
    check_unmerged(model)
    known = adapter_names(model)
    problems = [f"{name!r}{did_you_mean(name, known)}" for name in names if name not in known]
    raise_problems(problems, "no such adapter")
    given = names if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
    weights = {name: float(weight) for name, weight in given.items()}
    problems = [
        f"the weight of {name!r} is {weight}; expected a number"
        for name, weight in weights.items()
        if not abs(weight) < float("inf")
    ]
    weights = {name: weight for name, weight in weights.items() if weight != 1}
    grids = {
        name
        for _, layer in adapted_layers(model)
        for name in weights
        if name in layer.adapters and layer.adapter(name).moves_grid
    }
    problems += [
        f"{name!r} moves scales and offsets of quantised weights, which are rounded: there is no "
        "part of it, so its weight is 1"
        for name in sorted(grids)
    ]
    raise_problems(problems, "adapters cannot be weighted so")
    for _, layer in adapted_layers(model):
        layer.active = tuple(name for name in names if name in layer.adapters)
        layer.weights = {name: weight for name, weight in weights.items() if name in layer.active}


def check_unmerged(model: nn.Module) -> None:
    """Raise GraftError where adapters are merged in memory: they compute, whatever is switched."""
    if any(layer.merged is not None for _, layer in adapted_layers(model)):
        raise GraftError("the adapters are merged in memory; unmerge them first")


def remove_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter; a layer left with none is the very frozen layer that it was before.

    Raises GraftError for a name that no layer has.
    """
    known = adapter_names(model)
    check_unmerged(model)
    if name not in known:
        raise GraftError(f"no adapter {name!r} to remove{did_you_mean(name, known)}")
    for layer_name, layer in list(adapted_layers(model)):
        if name in layer.adapters:
            del layer.adapters[name]
            layer.active = tuple(active for active in layer.active if active != name)
            layer.weights.pop(name, None)
        if not layer.adapters:
            replace_module(model, layer_name, layer.base)


def adapter_parameters(model: nn.Module, name: str) -> dict[str, torch.nn.Parameter]:
    """Return an adapter's parameters by '<layer>.<parameter>'."""
    return {
        f"{layer_name}.{key}": parameter
        for layer_name, layer in adapted_layers(model)
        if name in layer.adapters
        for key, parameter in layer.adapter(name).named_parameters()
    }


def code_widths(model: nn.Module, parameters: Iterable[str]) -> dict[str, int]:
    """Return the width of the codes that each parameter moves, without those that move none."""
    bits = {name: layer.base.weight_format.deployed.bits for name, layer in adapted_layers(model)}
    widths = {name: bits.get(name.rpartition(".")[0]) for name in parameters}
    return {name: width for name, width in widths.items() if width is not None}
