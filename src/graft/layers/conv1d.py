"""GPT-2's linear layer, which Transformers calls Conv1D."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graft.formats.base import Packed, WeightFormat
from graft.layers.base import LayerKind
from graft.layers.frozen import FrozenLinear


class _Conv1D(LayerKind):
    """Conv1D, which stores its weight as [in_features, out_features]."""

    classes = ("transformers.pytorch_utils.Conv1D",)

    def shape(self, module: Any) -> tuple[int, int]:
        in_features, out_features = module.weight.shape
        return in_features, out_features

    def rows(self, module: Any, stored: Tensor) -> Tensor:
        return stored.T

    def stored(self, module: Any, weight: Tensor) -> Tensor:
        return weight.T

    def frozen(
        self, module: Any, weight_format: WeightFormat, packed: Packed, bias: Tensor | None
    ) -> FrozenLinear:
        in_features, out_features = self.shape(module)
        return FrozenLinear(in_features, out_features, weight_format, packed, bias, transposed=True)


CONV1D = _Conv1D()
