"""A linear layer whose weight is the product of two thin matrices."""

from __future__ import annotations

from torch import Tensor, nn

DOWN, UP = "down", "up"
"""What the two factors are called inside the layer."""


class Factored(nn.Module):
    """y = up(down(x)): W ≈ B A with A [rank, in_features] in `down` and B [out_features, rank] in
    `up`, which has the bias.

    Both are linear layers as any other: by their names they are quantised, adapted, frozen and
    trained, each by itself.
    """

    def __init__(self, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.down, self.up = down, up

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out_features] in x's dtype; x [..., in_features]."""
        y: Tensor = self.up(self.down(x))
        return y
