"""Rounding the weights of a model in training: from then on it computes with integers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from graft.adapters.adapted import AdaptedLinear
from graft.adapters.attach import adapted_layers, replace_module
from graft.calibrate.base import OnLayer, Solver
from graft.formats.base import WeightFormat
from graft.formats.dense import DenseFormat
from graft.formats.latent import LatentFormat
from graft.layers.frozen import FrozenLinear


def round_latents(
    model: nn.Module,
    batches: Sequence[Tensor],
    damping: float,
    solver: Solver,
    on_layer: OnLayer | None = None,
    on_rounded: Callable[[], None] | None = None,
) -> None:
    """Round the latent weights of a model whose low-rank updates have trained densely so far.

    The solver rounds W + s B A on the batches, to codes and a grid. The new latent weight is what
    it rounded, less s B A, so that A and B go on training where they are, now inside the rounding,
    and the grid begins to train. While it runs, a float32 copy of the weights is there.

    batches: input_ids int64 [rows, tokens]. on_rounded is called when the model's layers are the
    new frozen ones without their adapters. Raises GraftError as the solver does.
    """
    layers = dict(adapted_layers(model))
    with torch.no_grad():
        targets: dict[str, WeightFormat] = {}
        for name, layer in layers.items():
            latent = layer.base.weight_format
            assert isinstance(latent, LatentFormat)
            targets[name] = dataclasses.replace(latent, rounds=True, dtype="float32")
            weight = layer.base.dense_weight(torch.float32) + _update(layer)
            dense = layer.base.replaced(DenseFormat("float32"), {"weight": weight})
            replace_module(model, name, dense)
        solver.round_model(model, targets, batches, damping, on_layer)
        for name, layer in layers.items():
            rounded = model.get_submodule(name)
            assert isinstance(rounded, FrozenLinear)
            latent = layer.base.weight_format
            assert isinstance(latent, LatentFormat)
            weight = rounded.packed["weight"] - _update(layer)
            packed = rounded.packed | latent.keep(weight)
            own = dataclasses.replace(latent, rounds=True)
            replace_module(model, name, rounded.replaced(own, packed))
    if on_rounded is not None:
        on_rounded()
    for name, layer in layers.items():
        rounded = model.get_submodule(name)
        assert isinstance(rounded, FrozenLinear)
        layer.base = rounded
        replace_module(model, name, layer)
        for adapter in layer.active_adapters():
            adapter.let_grid_train(True)


def _update(layer: AdaptedLinear) -> Tensor:
    (adapter,) = layer.active_adapters()
    return adapter.dense_update()
