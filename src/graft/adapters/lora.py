"""LoRA: a trainable low-rank update beside a frozen weight of any format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from graft.adapters.adapted import AdaptedLinear
from graft.adapters.base import Adapter, StoredAdapter, fill, lora_scaling, low_rank_start
from graft.adapters.config import AdapterConfig
from graft.adapters.method import Kept, Method
from graft.errors import GraftError
from graft.formats.registry import AS_IT_IS
from graft.kernels.low_rank.ops import lora_linear
from graft.layers.frozen import FrozenLinear


class LoraAdapter(Adapter):
    """y = W x + s (B A x + b), s = alpha/rank (LoRA, arXiv 2106.09685, equation 3).

    A: float32 [rank, in_features], uniform within 1/sqrt(in_features); B: float32
    [out_features, rank], zero, so that training starts from the base model. b: float32
    [out_features], zero, only with `bias`. Dropout acts on the input of the low-rank path while
    training. On an NF4 base this is QLoRA (2305.14314).
    """

    method = "lora"
    peft_names = {"A": "lora_A.weight", "B": "lora_B.weight", "bias": "lora_B.bias"}
    scaling: float
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
        self.A, self.B = low_rank_start(rank, in_features, out_features, device)
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, device=device)) if bias else None
        )

    @classmethod
    def from_layer(cls, layer: FrozenLinear, config: AdapterConfig) -> Self:
        """Return a fresh adapter, which changes nothing yet."""
        return cls(
            layer.in_features,
            layer.out_features,
            config.update_rank,
            config.alpha,
            config.rslora,
            config.dropout,
            config.adapter_bias,
            next(layer.parameters()).device,
        )

    @classmethod
    def from_stored(cls, layer: FrozenLinear, stored: StoredAdapter) -> Self:
        """Return the adapter of PEFT's files."""
        rank = low_rank(stored)
        dropout = float(stored.peft.get("lora_dropout") or 0.0)
        adapter = cls._blank(layer, rank, dropout, "bias" in stored.tensors)
        adapter.scaling = scaling_of(stored)
        fill(adapter, stored.tensors)
        return adapter

    @classmethod
    def _blank(cls, layer: FrozenLinear, rank: int, dropout: float, bias: bool) -> Self:
        return cls(layer.in_features, layer.out_features, rank, dropout=dropout, bias=bias)

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
        y: Tensor = lora_linear(x, base.kernel_weight(), self.A, self.B, self.scaling)[0]
        return y if self.bias is None else y + (self.bias * self.scaling).to(y.dtype)

    def delta(self, base: FrozenLinear) -> Tensor:
        """Return s B A, float64 [out_features, in_features]."""
        return (self.B.double() @ self.A.double()) * self.scaling

    def delta_bias(self) -> Tensor | None:
        """Return s b, float64 [out_features], or None."""
        return None if self.bias is None else self.bias.double() * self.scaling

    def lora_tensors(self, base: FrozenLinear, as_lora: bool) -> dict[str, Tensor]:
        """Return A, B and what else it has."""
        return dict(self.named_parameters())

    def peft_settings(self, as_lora: bool) -> dict[str, Any]:
        """Return dropout and bias."""
        return {"lora_dropout": self.dropout, "lora_bias": self.bias is not None}


def low_rank(stored: StoredAdapter) -> int:
    """Return the rank of a stored low-rank update; raises GraftError when it has none."""
    if "A" not in stored.tensors or "B" not in stored.tensors:
        raise GraftError("lora_A or lora_B is missing")
    first, second = stored.tensors["A"], stored.tensors["B"]
    if first.ndim != 2 or second.ndim != 2 or first.shape[0] != second.shape[1]:
        raise GraftError(
            f"lora_A is {list(first.shape)} and lora_B {list(second.shape)}; expected [rank, "
            "inputs] and [outputs, rank]"
        )
    return first.shape[0]


def scaling_of(stored: StoredAdapter, peft_factor: float = 1.0) -> float:
    """Return the scaling: exactly, where the file says it, else PEFT's times a factor.

    Raises GraftError when there is none.
    """
    if stored.scaling is not None:
        return stored.scaling
    if stored.peft_scaling is None:
        raise GraftError("its files say no scaling; save the adapter again")
    return stored.peft_scaling * peft_factor


class Lora(Method):
    """LoRA on the weights as they are, or in a format that was asked for."""

    name = "lora"
    on_quantised = "qlora"
    adapter = LoraAdapter
    low_rank = adds_low_rank = True
    takes = frozenset({"dropout", "adapter_bias"})
    whys = {
        "dropout": "its update is part of the weights, and dropout on the input has no such form"
    }

    def kept(self, layer: AdaptedLinear, config: AdapterConfig, dtype: torch.dtype) -> Kept:
        """Return the input and A x; with dropout a copy of the input and the mask instead."""
        out_features, rank = layer.base.out_features, config.update_rank
        if not config.dropout:
            return Kept((out_features + rank,), per_token=rank)
        # A and B as it computes.
        numbers = sum(p.numel() for p in layer.adapters.parameters())
        copies = numbers * dtype.itemsize if dtype != torch.float32 else 0
        return Kept(
            (out_features, rank), False, rank + 2 * layer.base.in_features, constant_bytes=copies
        )

    def reads(self, own: str | None, peft: Mapping[str, Any]) -> bool:
        """Return whether files hold a LoRA, which is what PEFT's hold where no other method says it
        reads them."""
        return own in (None, LoraAdapter.method)

    def peft_problem(self, config: AdapterConfig) -> str | None:
        """Return None: it is PEFT's own."""
        return None


class QLora(Lora):
    """LoRA on 4-bit NormalFloat with doubly quantised constants (arXiv 2305.14314)."""

    name = "qlora"
    default_format = "nf4"
    double_quant = True
    deploys_into_original = True

    def format_problem(self, name: str) -> str | None:
        """Return why it cannot train on weights of that format."""
        if name == AS_IT_IS:
            return f"method {self.name} needs quantised weights; train with lora, or drop --format"
        return None


LORA, QLORA = Lora(), QLora()
