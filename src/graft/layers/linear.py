"""torch's linear layer, and the frozen one that takes a layer's place."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graft.formats.base import Packed, WeightFormat
from graft.layers.base import LayerKind
from graft.layers.frozen import FrozenLinear


class _Linear(LayerKind):
    """nn.Linear, which stores its weight as [out_features, in_features]; Falcon's is the same."""

    classes = (
        "torch.nn.modules.linear.Linear",
        "transformers.models.falcon.modeling_falcon.FalconLinear",
    )

    def shape(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features


class _Frozen(LayerKind):
    """FrozenLinear, which knows how the module stored its weight that it stands for."""

    classes = ("graft.layers.frozen.FrozenLinear",)

    def shape(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def rows(self, module: Any, stored: Tensor) -> Tensor:
        return stored.T if module.transposed else stored

    def stored(self, module: Any, weight: Tensor) -> Tensor:
        return weight.T if module.transposed else weight

    def frozen(
        self, module: Any, weight_format: WeightFormat, packed: Packed, bias: Tensor | None
    ) -> FrozenLinear:
        in_features, out_features = self.shape(module)
        return FrozenLinear(
            in_features, out_features, weight_format, packed, bias, module.transposed
        )


LINEAR = _Linear()
FROZEN = _Frozen()
