"""What a kind of layer is: modules that compute x Wᵀ + bias, each holding W in its own way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from graft.formats.base import Packed, WeightFormat
from graft.layers.frozen import FrozenLinear


class LayerKind(ABC):
    """How the modules of a few classes hold one weight [out_features, in_features] and a bias.

    A module's bias, if it has any, is its parameter `bias` [out_features].
    """

    classes: tuple[str, ...]
    """Qualified names of the classes; what inherits from one is of this kind as well. So a class
    is recognised without importing the library that has it."""

    weight: str = "weight"
    """The parameter that holds the weight, which is its name in a Hugging Face folder too."""

    @abstractmethod
    def shape(self, module: Any) -> tuple[int, int]:
        """Return (in_features, out_features)."""

    def rows(self, module: Any, stored: Tensor) -> Tensor:
        """Return the weight [out_features, in_features] that is stored as this parameter.

        Where it can be it is a view, so that a frozen layer shares the module's data.
        """
        return stored

    def stored(self, module: Any, weight: Tensor) -> Tensor:
        """Return a weight [out_features, in_features] as the parameter stores it: undo `rows`."""
        return weight

    def bias(self, module: nn.Module) -> Tensor | None:
        """Return the bias [out_features], or None."""
        return dict(module.named_parameters(recurse=False)).get("bias")

    def frozen(
        self, module: Any, weight_format: WeightFormat, packed: Packed, bias: Tensor | None
    ) -> FrozenLinear:
        """Return the layer that takes the module's place, its weight packed in that format.

        Where `stored` does something it is a subclass of FrozenLinear that is of this kind.
        """
        in_features, out_features = self.shape(module)
        return FrozenLinear(in_features, out_features, weight_format, packed, bias)
