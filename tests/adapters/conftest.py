from __future__ import annotations

import pytest
import torch

from graft.formats.base import WeightFormat
from graft.layers.frozen import FrozenLinear


@pytest.fixture
def frozen():
    """A factory of frozen layers with a random weight; in_features 44 leaves a short group."""

    def make(
        weight_format: WeightFormat, out_features: int = 6, in_features: int = 44, bias: bool = True
    ) -> FrozenLinear:
        packed = weight_format.pack(torch.randn(out_features, in_features))
        offset = torch.randn(out_features) if bias else None
        return FrozenLinear(in_features, out_features, weight_format, packed, offset)

    return make


@pytest.fixture
def randomise():
    """Give every parameter of an adapter a random value, as if it had been trained."""

    def move(adapter: torch.nn.Module, size: float = 0.1) -> torch.nn.Module:
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(torch.randn_like(parameter) * size)
        return adapter

    return move
