"""Mixed bit widths: what each width costs each layer, and the best choice within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional

from graft.calibrate.base import OnLayer, frozen_layer
from graft.calibrate.chain import StageChain
from graft.calibrate.driver import stages
from graft.calibrate.hessian import HessianSum, output_error
from graft.errors import GraftError
from graft.formats.base import WeightFormat, storage_bytes

_MOST_UNITS = 1 << 16
"""Steps that the budget is divided into at most; sizes are rounded up to whole steps."""


def measure_widths(
    model: nn.Module,
    layer_names: Sequence[str],
    batches: Sequence[Tensor],
    formats: Sequence[WeightFormat],
    on_layer: OnLayer | None = None,
) -> dict[str, list[float]]:
    """Return by layer an estimate of how much the loss moves when it is rounded to each format.

    With y = x Wᵀ and g = dloss/dy, rounding moves the loss by g·dy to first order, and the cost is
    E[|g|²] E[|dy|²] / out_features, its mean square for errors in no particular direction: the
    squared output error, weighted so that layers compare. The model is left as it is; its named
    layers are dense frozen ones. Each layer is rounded to nearest.

    batches: input_ids int64 [rows, tokens], without padding.
    """
    weights = _gradient_power(model, layer_names, batches)
    costs: dict[str, list[float]] = {}
    grouped = stages(model, layer_names)
    chain = StageChain(model, list(grouped), batches)
    for stage, names in grouped.items():
        layers = {name: frozen_layer(model, name) for name in names}
        sums = {
            name: HessianSum(layer.in_features, next(layer.parameters()).device)
            for name, layer in layers.items()
        }
        chain.run(stage, [(layer, sums[name]) for name, layer in layers.items()])
        for name, layer in layers.items():
            weight = layer.dense_weight(torch.float32)
            scale = weights[name] / (max(sums[name].tokens, 1) * layer.out_features)
            costs[name] = []
            for chosen in formats:
                rounded = layer.replaced(chosen, chosen.pack(weight)).dense_weight(torch.float32)
                costs[name].append(scale * output_error(weight, rounded, sums[name].value))
            if on_layer is not None:
                on_layer(len(costs), len(layer_names))
    return costs


def allocate(
    costs: Mapping[str, Sequence[float]], sizes: Mapping[str, Sequence[int]], budget: int
) -> dict[str, int]:
    """Return by layer the index of its choice: least total cost within a total size.

    The multiple-choice knapsack, solved exactly by dynamic programming over the size in units of
    the sizes' greatest common divisor (larger ones, with sizes rounded up, when there would be more
    than 65,536). Of equal totals the earlier choice of the later layer wins, so the result repeats.

    Raises GraftError when even the smallest choices exceed the budget.
    """
    least = sum(min(size) for size in sizes.values())
    if least > budget:
        raise GraftError(
            f"the budget holds {budget} bytes, and the smallest formats take {least}: raise it"
        )
    # Above the smallest choice only differences count, which keeps the table small.
    spare = min(budget - least, sum(max(size) - min(size) for size in sizes.values()))
    steps = [n - min(size) for size in sizes.values() for n in size]
    unit = max(math.gcd(*steps), -(-spare // _MOST_UNITS), 1)
    units = spare // unit
    total = torch.zeros(units + 1, dtype=torch.float64)
    picked = torch.empty(len(costs), units + 1, dtype=torch.uint8)
    taken = {name: [-(-(n - min(size)) // unit) for n in size] for name, size in sizes.items()}
    for layer, (name, cost) in enumerate(costs.items()):
        best = torch.full_like(total, torch.inf)
        for choice, (price, shift) in enumerate(zip(cost, taken[name], strict=True)):
            if shift > units:
                continue
            moved = torch.full_like(total, torch.inf)
            moved[shift:] = total[: units + 1 - shift] + price
            better = moved < best
            best = torch.where(better, moved, best)
            picked[layer, better] = choice
        total = best
    chosen, left = {}, int(total.argmin())
    for layer, name in reversed(list(enumerate(costs))):
        chosen[name] = int(picked[layer, left])
        left -= taken[name][chosen[name]]
    return {name: chosen[name] for name in costs}


def choose_widths(
    model: nn.Module,
    layer_names: Sequence[str],
    batches: Sequence[Tensor],
    formats: Sequence[WeightFormat],
    bits_per_weight: float,
    on_layer: OnLayer | None = None,
) -> dict[str, WeightFormat]:
    """Return each layer's format: the least summed cost within an average of bits per weight.

    The average is over the named layers' weights and counts codes, scales and offsets, as they are
    stored. See `measure_widths` and `allocate`.
    """
    layers = {name: frozen_layer(model, name) for name in layer_names}
    sizes = {
        name: [
            storage_bytes(candidate, layer.out_features, layer.in_features) for candidate in formats
        ]
        for name, layer in layers.items()
    }
    weights = sum(layer.out_features * layer.in_features for layer in layers.values())
    least = 8 * sum(min(size) for size in sizes.values()) / weights
    if least > bits_per_weight:
        raise GraftError(
            f"--budget {bits_per_weight:g}: the smallest format takes {least:.3f} bits per weight "
            "with its scales and offsets; raise the budget, or the group size"
        )
    costs = measure_widths(model, layer_names, batches, formats, on_layer)
    picked = allocate(
        costs, {name: sizes[name] for name in costs}, int(bits_per_weight * weights / 8)
    )
    return {name: formats[index] for name, index in picked.items()}


def _gradient_power(
    model: nn.Module, layer_names: Sequence[str], batches: Sequence[Tensor]
) -> dict[str, float]:
    """Return E[|dloss/dy|²] over the tokens of each layer, the loss being summed over tokens."""
    power = dict.fromkeys(layer_names, 0.0)
    tokens = sum(batch.numel() for batch in batches)

    def watch(name: str) -> Callable[..., None]:
        def add(gradient: Tensor) -> None:
            power[name] += gradient.double().square().sum().item() / tokens

        def after(_: nn.Module, __: object, output: Tensor) -> None:
            output.register_hook(add)

        return after

    def differentiable(_: nn.Module, __: object, output: Tensor) -> Tensor:
        return output.detach().requires_grad_()

    embedding = next(module for module in model.modules() if isinstance(module, nn.Embedding))
    device = next(model.parameters()).device
    with ExitStack() as hooks, torch.enable_grad():
        hooks.callback(embedding.register_forward_hook(differentiable).remove)
        for name in layer_names:
            layer = model.get_submodule(name)
            hooks.callback(layer.register_forward_hook(watch(name)).remove)
        for batch in batches:
            ids = batch.to(device)
            logits = model(input_ids=ids, use_cache=False).logits.float()
            functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
            ).backward()
    return power
