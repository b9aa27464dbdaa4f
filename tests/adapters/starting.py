"""One frozen layer whose adapter begins with a start, as a run does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.adapted import AdaptedLinear
from graft.adapters.attach import adapted_layer, attach_adapter
from graft.adapters.config import AdapterConfig
from graft.adapters.registry import method_of
from graft.adapters.starts.base import Inputs
from graft.adapters.starts.registry import STARTS
from graft.formats.base import WeightFormat
from graft.formats.dense import DenseFormat
from graft.layers.frozen import FrozenLinear


def seen(x: Tensor) -> Inputs:
    """Return what a layer with the inputs x [tokens, in_features] is told of them."""
    x = x.double()
    return Inputs(x.T @ x, x.sum(0), len(x))


def problems(config: AdapterConfig, quantises: bool = True) -> list[str]:
    method = method_of(config)
    return STARTS[config.init].problems(
        config,
        low_rank=method.low_rank,
        adds_low_rank=method.adds_low_rank,
        quantises=quantises,
        solver=None,
    )


def begun(
    weight: Tensor,
    x: Tensor,
    weight_format: WeightFormat | None = None,
    rounding: Callable[[WeightFormat, Tensor], Any] = lambda kept, weight: kept.pack(weight),
    **options: Any,
) -> AdaptedLinear:
    """Return the layer of a weight [out_features, in_features] with an adapter that has begun."""
    config = AdapterConfig(**options)
    weight_format = weight_format or DenseFormat("float32")
    start = STARTS[config.init]
    preparation = start.prepare(config)
    packed, ranks = None, None
    if preparation is not None:
        if start.reads_inputs:
            preparation.look("0", weight, seen(x))
        packed = preparation.pack("0", weight, weight_format, lambda w: rounding(weight_format, w))
        ranks = preparation.ranks()
    packed = packed or rounding(weight_format, weight)
    out_features, in_features = weight.shape
    model = nn.Sequential(FrozenLinear(in_features, out_features, weight_format, packed))
    attach_adapter(model, ["0"], config, ranks=ranks)
    start.begin(model, preparation)
    return adapted_layer(model, "0")


def error(found: Tensor, expected: Tensor) -> float:
    """Return max |found - expected| over max |expected|."""
    return ((found.double() - expected.double()).abs().max() / expected.abs().max()).item()


def spread_weight(rows: int, columns: int) -> Tensor:
    """A weight with a few strong directions, as trained ones have."""
    return torch.randn(rows, 4) @ torch.randn(4, columns) / 4 + torch.randn(rows, columns) / 4
