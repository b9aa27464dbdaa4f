"""A linear layer whose weight is the product of two thin matrices."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from graft.layers.registry import kind_of

DOWN, UP = "down", "up"
"""What the two factors are called inside the layer."""


class Factored(nn.Module):
    """y = up(down(x)): W = B A with A [rank, in_features] in `down` and B [out_features, rank] in
    `up`, which has the bias.

    Both are linear layers as any other: by their names they are quantised, adapted, frozen and
    trained, each by itself. `transposed` says that the layer stands for one that stores W as
    [in_features, out_features] (GPT-2's Conv1D).
    """

    def __init__(self, down: nn.Module, up: nn.Module, transposed: bool = False) -> None:
        super().__init__()
        self.down, self.up, self.transposed = down, up, transposed

    @property
    def weight(self) -> Tensor:
        """The product of unquantised factors as the layer's own code stores it, which a family's
        initialisation asks for."""
        product = self.up.get_parameter("weight") @ self.down.get_parameter("weight")
        return product.T if self.transposed else product

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out_features] in x's dtype; x [..., in_features]."""
        y: Tensor = self.up(self.down(x))
        return y


def factored(module: nn.Module, rank: int) -> Factored:
    """Return the layer of that rank that takes a linear layer's place, its factors on the meta
    device and its bias the module's own."""
    kind = kind_of(module)
    in_features, out_features = kind.shape(module)
    dtype, bias = module.get_parameter(kind.weight).dtype, kind.bias(module)
    down = nn.Linear(in_features, rank, False, "meta", dtype)
    up = nn.Linear(rank, out_features, False, "meta", dtype)
    if bias is not None:
        up.bias = nn.Parameter(bias.detach(), requires_grad=False)
    stored = kind.stored(module, torch.empty(2, 1, device="meta")).shape
    return Factored(down, up, transposed=stored == (1, 2)).requires_grad_(False)


def factored_layers(model: nn.Module) -> Iterator[tuple[str, Factored]]:
    """Yield every factored layer by name."""
    for name, module in model.named_modules():
        if isinstance(module, Factored):
            yield name, module


def is_smaller(rank: int, out_features: int, in_features: int) -> bool:
    """Return whether two factors of a rank have fewer weights than the matrix."""
    return rank * (out_features + in_features) < out_features * in_features
