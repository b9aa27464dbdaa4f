"""Embedding and head kept in the bfloat16 of their file while the model computes in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graft.kernels.frozen.ops import linear
from graft.kernels.packed.weight import dense_weight
from graft.layers.base import LayerKind

NARROW = torch.bfloat16


class NarrowLinear(nn.Linear):
    """y = x Wᵀ + bias in the dtype of x, float32, with W [out_features, in_features] in bfloat16.

    The kernel widens W while it reads it, which is exact; nothing of it trains.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + bias; x [..., in_features]."""
        y: Tensor = linear(x, dense_weight(self.weight))
        return y if self.bias is None else y + self.bias


class NarrowEmbedding(nn.Embedding):
    """Rows of W [tokens, features] in float32, with W in bfloat16; nothing of it trains."""

    def forward(self, ids: Tensor) -> Tensor:
        """Return W[ids] [..., features]."""
        rows: Tensor = super().forward(ids)
        return rows.float()


class _Narrow(LayerKind):
    """NarrowLinear."""

    classes = ("graft.layers.narrow.NarrowLinear",)

    def shape(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features


NARROW_LINEAR = _Narrow()
NARROW_CLASSES = (NarrowLinear, NarrowEmbedding)


def widen(model: nn.Module) -> None:
    """Undo `narrow` in a model: its weights become float32, and what is tied stays so."""
    wide: dict[Tensor, nn.Parameter] = {}
    plain = {NarrowLinear: nn.Linear, NarrowEmbedding: nn.Embedding}
    for module in model.modules():
        chosen = plain.get(type(module))
        if chosen is not None:
            weight = module.get_parameter("weight")
            if weight not in wide:
                wide[weight] = nn.Parameter(weight.detach().float(), requires_grad=False)
            module.weight = wide[weight]
            module.__class__ = chosen


def narrow(module: nn.Module) -> None:
    """Let an nn.Linear or nn.Embedding hold its weight in bfloat16.

    Its class becomes the narrow one; a weight that has data is rounded. Raises TypeError for a
    module of any other class.
    """
    classes = {nn.Linear: NarrowLinear, nn.Embedding: NarrowEmbedding}
    chosen = classes.get(type(module))
    if chosen is None:
        raise TypeError(f"a {type(module).__name__} cannot be kept narrow")
    module.__class__ = chosen
    weight = module.get_parameter("weight").detach()
    module.weight = nn.Parameter(weight.to(NARROW), requires_grad=False)
