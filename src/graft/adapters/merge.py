"""Folding adapters into the frozen weight, with the error that the fold costs measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from graft.adapters.adapted import AdaptedLinear
from graft.adapters.attach import adapted_layers, replace_module
from graft.formats.base import WeightFormat
from graft.formats.dense import DenseFormat
from graft.layers.frozen import FrozenLinear


@dataclass(frozen=True)
class MergeError:
    """How far the merged weight is from the weight that the adapted layer computed with."""

    max_abs: float
    """Largest |merged - trained|, in the weight's units."""
    relative_to_update: float
    """RMS of merged - trained over RMS of trained - base; 0 when nothing was trained and lost."""
    exact: bool
    """Every element of the merged weight equals the trained one."""

    def as_dict(self) -> dict[str, float | bool]:
        """Return the figures by name."""
        return asdict(self)


@dataclass(frozen=True)
class MergeResult:
    """The merged layer and its measured error."""

    layer: FrozenLinear
    error: MergeError


def merge(
    layer: AdaptedLinear,
    target: WeightFormat | None = None,
    base: FrozenLinear | None = None,
    start: str | None = None,
) -> MergeResult:
    """Fold the active adapters into a new frozen layer; the adapted layer is left as it is.

    With target None the result is exact wherever it can be: grid adapters alone keep the base's
    format with moved statistics; anything else becomes dense float32. A given target is packed
    to, rounding the update with the weight. With `base` the update is added to that layer's weight
    instead of the one it was trained on; `start` then names the layer's adapter as it was before
    the first step, when it began as a part of the quantised weight (LoftQ, QPiSSA): only what was
    trained since is added. The error says what all of this costs.
    """
    with torch.no_grad():
        trained = layer.effective_weight()
        own = layer.base.dense_weight(torch.float32).double()
        packed = _exact_packed(layer) if base is None and target is None else None
        weight_format = layer.base.weight_format.deployed
        if packed is None:
            weight_format = target or DenseFormat("float32")
            moved = 0.0 if base is None else base.dense_weight(torch.float32).double() - own
            made_up = 0.0 if start is None else layer.adapter(start).delta(layer.base)
            packed = weight_format.pack((trained + moved - made_up).float())
        merged = layer.base.replaced(weight_format, packed)
        _add_bias(merged, layer)
        return MergeResult(merged, _measure(merged, trained, own))


def _exact_packed(layer: AdaptedLinear) -> dict[str, Tensor] | None:
    """Return packed tensors of the base's own format that hold the update exactly, if they can."""
    if not layer.moves_grid_only():
        return None
    packed = layer.effective_packed()
    specs = layer.base.weight_format.deployed.storage(
        layer.base.out_features, layer.base.in_features
    )
    return {name: packed[name].detach().to(spec.dtype) for name, spec in specs.items()}


def _add_bias(merged: FrozenLinear, layer: AdaptedLinear) -> None:
    move = layer.delta_bias()
    if move is not None:
        old = torch.zeros_like(move) if merged.bias is None else merged.bias.double()
        dtype = torch.float32 if merged.bias is None else merged.bias.dtype
        merged.bias = torch.nn.Parameter((old + move).to(dtype), requires_grad=False)


def _measure(merged: FrozenLinear, trained: Tensor, base: Tensor) -> MergeError:
    lost = merged.dense_weight(torch.float32).double() - trained
    update_rms = (trained - base).square().mean().sqrt().item()
    lost_rms = lost.square().mean().sqrt().item()
    relative = lost_rms / update_rms if update_rms > 0 else (0.0 if lost_rms == 0 else float("inf"))
    return MergeError(
        max_abs=lost.abs().max().item(),
        relative_to_update=relative,
        exact=not bool(lost.any()),
    )


def merge_adapters(
    model: torch.nn.Module,
    target: WeightFormat | None = None,
    bases: Mapping[str, FrozenLinear] | None = None,
    start: str | None = None,
    on_layer: Callable[[int, int], None] | None = None,
) -> dict[str, MergeError]:
    """Merge every adapted layer of a model in place, one at a time; return each layer's error.

    `target`, `start` and the layer's own entry in `bases` are as in `merge`. `on_layer` is called
    with (layers done, layers in all).
    """
    layers = list(adapted_layers(model))
    errors = {}
    for done, (name, layer) in enumerate(layers, start=1):
        result = merge(layer, target, None if bases is None else bases[name], start)
        replace_module(model, name, result.layer)
        errors[name] = result.error
        if on_layer is not None:
            on_layer(done, len(layers))
    return errors


def merge_in_memory(
    model: torch.nn.Module,
    target: WeightFormat | None = None,
    on_layer: Callable[[int, int], None] | None = None,
) -> dict[str, MergeError]:
    """Let every adapted layer compute with one merged weight; return each layer's error.

    The adapters and the layers that they were trained on stay beside it, so that `unmerge` gives
    back the very bits. `target` and `on_layer` are as in `merge_adapters`.
    """
    layers = [(name, layer) for name, layer in adapted_layers(model) if layer.active]
    results = {}
    for done, (name, layer) in enumerate(layers, start=1):
        results[name] = merge(layer, target)
        if on_layer is not None:
            on_layer(done, len(layers))
    for name, layer in layers:
        results[name].layer.train(layer.training)
        layer.compute_with(results[name].layer)
    return {name: result.error for name, result in results.items()}


def unmerge(model: torch.nn.Module) -> None:
    """Let every layer compute with its base and adapters again."""
    for _, layer in adapted_layers(model):
        layer.compute_with(None)
