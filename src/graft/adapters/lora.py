"""LoRA: a trainable low-rank update beside a frozen weight of any format."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from graft.adapters.base import Adapter, lora_scaling
from graft.kernels.low_rank.ops import lora_linear, operands
from graft.layers.frozen import FrozenLinear


class LoraAdapter(Adapter):
    """y = W x + s (B A x + b), s = alpha/rank (LoRA, arXiv 2106.09685, equation 3).

    A: float32 [rank, in_features], uniform within 1/sqrt(in_features); B: float32
    [out_features, rank], zero, so that training starts from the base model. b: float32
    [out_features], zero, only with `bias`. Dropout acts on the input of the low-rank path while
    training. On an NF4 base this is QLoRA (2305.14314).
    """

    method = "lora"
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float | None = None,
        rslora: bool = False,
        dropout: float = 0.0,
        bias: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.rank = rank
        self.scaling = lora_scaling(rank, alpha, rslora)
        self.dropout = dropout
        self.A = nn.Parameter(torch.empty(rank, in_features, device=device))
        self.B = nn.Parameter(torch.zeros(out_features, rank, device=device))
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, device=device)) if bias else None
        )
        bound = 1 / math.sqrt(in_features)
        nn.init.uniform_(self.A, -bound, bound)

    def added_output(self, x: Tensor, base: FrozenLinear) -> Tensor:
        """Return s (B A x + b) in x's dtype."""
        dropped = functional.dropout(x, self.dropout, self.training)
        hidden = functional.linear(dropped, self.A.to(x.dtype))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(hidden, self.B.to(x.dtype), bias) * self.scaling

    def fused_output(self, x: Tensor, base: FrozenLinear) -> Tensor | None:
        """Return W x + s (B A x + b) in one pass over W; there is no such pass with dropout."""
        if self.dropout and self.training:
            return None
        weight = operands(base.kernel_weight())
        y: Tensor = lora_linear(x, *weight, self.A, self.B, self.scaling)[0]
        return y if self.bias is None else y + (self.bias * self.scaling).to(y.dtype)

    def delta(self, base: FrozenLinear) -> Tensor:
        """Return s B A, float64 [out_features, in_features]."""
        return (self.B.double() @ self.A.double()) * self.scaling

    def delta_bias(self) -> Tensor | None:
        """Return s b, float64 [out_features], or None."""
        return None if self.bias is None else self.bias.double() * self.scaling
