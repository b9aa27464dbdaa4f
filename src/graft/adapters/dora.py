"""DoRA: a low-rank update that turns the rows of a weight, and the length of each row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from graft.adapters.adapted import AdaptedLinear
from graft.adapters.base import StoredAdapter
from graft.adapters.config import AdapterConfig
from graft.adapters.lora import Lora, LoraAdapter, QLora
from graft.adapters.method import Config, Kept, Method
from graft.errors import GraftError
from graft.kernels.backend.operation import Operation
from graft.kernels.frozen.ops import linear
from graft.kernels.low_rank.ops import lora_linear
from graft.kernels.packed.weight import Weight
from graft.layers.frozen import FrozenLinear

_TINY = torch.finfo(torch.float32).tiny
"""Stands for the norm of a row of zeros, which stays 0 whatever it is divided by."""


class DoraAdapter(LoraAdapter):
    """y = m / |W + s B A| (W x + s B A x), the norm taken row by row (DoRA, arXiv 2402.09353).

    A, B and s are LoRA's; m: float32 [out_features], |W + s B A| at the start, so that training
    starts from the base model. The norm is a constant in the gradient (section 4.3). Dropout acts
    on what is beyond W x, as in PEFT: y = W x + (m / |..| (W + s B A) - W) dropout(x). The layer's
    own bias is not scaled. |W|² is computed once, from the frozen weight, and is not saved.

    The factor m / |..| is float32 whatever x is: in bfloat16 the next number after 1 is 1.008.
    """

    peft_names = {**LoraAdapter.peft_names, "magnitude": "lora_magnitude_vector"}
    squares: Tensor

    def __init__(
        self,
        base: FrozenLinear,
        rank: int,
        alpha: float | None = None,
        rslora: bool = False,
        dropout: float = 0.0,
    ) -> None:
        device = next(base.parameters()).device
        sizes = base.in_features, base.out_features
        super().__init__(*sizes, rank, alpha, rslora, dropout, device=device)
        if device.type == "meta":
            squares = torch.empty(base.out_features, device=device)
        else:
            with torch.no_grad():
                squares = row_squares(base.dense_weight(torch.float32))
        self.register_buffer("squares", squares, persistent=False)
        self.magnitude = nn.Parameter(squares.sqrt())
        self._kept: tuple[list[tuple[int, int]], Tensor] | None = None

    @classmethod
    def from_layer(cls, layer: FrozenLinear, config: AdapterConfig) -> Self:
        """Return a fresh adapter, which changes nothing yet."""
        return cls(layer, config.update_rank, config.alpha, config.rslora, config.dropout)

    @classmethod
    def from_stored(cls, layer: FrozenLinear, stored: StoredAdapter) -> Self:
        """Return the adapter of PEFT's files."""
        if "magnitude" not in stored.tensors:
            raise GraftError("lora_magnitude_vector is missing")
        adapter: Self = super().from_stored(layer, stored)
        return adapter

    @classmethod
    def _blank(cls, layer: FrozenLinear, rank: int, dropout: float, bias: bool) -> Self:
        return cls(layer, rank, dropout=dropout)

    def started(self, base: FrozenLinear) -> None:
        """Let the magnitudes be the rows' norms with A and B, so that they change nothing."""
        self.magnitude.copy_(self.norms(base))

    def norms(self, base: FrozenLinear) -> Tensor:
        """Return |W + s B A| of each row, float32 [out_features], without a gradient."""
        return self._norms(base.kernel_weight())

    def _norms(self, weight: Weight) -> Tensor:
        low_rank = self.A.detach(), self.B.detach(), self.scaling
        out: Tensor = dora_norms(weight, *low_rank, self.squares)
        return out

    def _factor(self, weight: Weight) -> Tensor:
        """Return m / |W + s B A|, float32 [out_features]; differentiable in m.

        Without gradients it is kept until a parameter changes: a token that is decoded costs less
        than the norms. A forward pass that records gradients drops it, as an optimizer that goes
        past PyTorch's count of changes may follow.
        """
        if torch.is_grad_enabled():
            self._kept = None
            return self.magnitude / self._norms(weight).clamp_min(_TINY)
        state = [(p.data_ptr(), p._version) for p in self.parameters()]
        if self._kept is None or self._kept[0] != state:
            self._kept = state, self.magnitude / self._norms(weight).clamp_min(_TINY)
        return self._kept[1]

    def _scaled(self, x: Tensor, base: FrozenLinear) -> Tensor:
        """Return m / |..| (W x + s B A x) in x's dtype."""
        weight = base.kernel_weight()
        y: Tensor = lora_linear(x, weight, self.A, self.B, self.scaling)[0]
        return (y * self._factor(weight)).to(y.dtype)

    def added_output(self, x: Tensor, base: FrozenLinear) -> Tensor:
        """Return (m / |..| (W + s B A) - W) x in x's dtype."""
        dropped = functional.dropout(x, self.dropout, self.training)
        own: Tensor = linear(dropped, base.kernel_weight())
        return self._scaled(dropped, base) - own

    def fused_output(self, x: Tensor, base: FrozenLinear) -> Tensor:
        """Return m / |..| (W x + s B A x); where dropout leaves x', W (x - x') on top of that."""
        if not (self.dropout and self.training):
            return self._scaled(x, base)
        dropped = functional.dropout(x, self.dropout, True)
        lost: Tensor = linear(x - dropped, base.kernel_weight())
        return lost + self._scaled(dropped, base)

    def delta(self, base: FrozenLinear) -> Tensor:
        """Return m / |W + s B A| (W + s B A) - W, float64 [out_features, in_features]."""
        weight = base.dense_weight(torch.float32).double()
        moved = super().delta(base).add_(weight)
        lengths = torch.linalg.vector_norm(moved, dim=1).clamp_min(_TINY)
        return moved.mul_((self.magnitude.double() / lengths)[:, None]).sub_(weight)

    def peft_settings(self, as_lora: bool) -> dict[str, Any]:
        """Return LoRA's, and that it is DoRA."""
        return {**super().peft_settings(as_lora), "use_dora": True}


# The norms of the updated weight's rows -----------------------------------------------------------


def row_squares(weight: Tensor) -> Tensor:
    """Return |w|² of each row of a weight [out_features, in_features], summed in float64.

    No float64 copy of the whole weight is made; float32 [out_features].
    """
    sums = [part.double().square().sum(1) for part in _in_parts(weight)]
    return torch.cat(sums).float()


def _in_parts(weight: Tensor) -> tuple[Tensor, ...]:
    """Return a few rows at a time, of about 4 million numbers."""
    parts: tuple[Tensor, ...] = weight.split(max(1, (1 << 22) // weight.shape[1]))
    return parts


def _times(weight: Weight, A: Tensor) -> Tensor:
    """Return W Aᵀ, float32 [out_features, rank], without a float32 copy of a dense weight."""
    first = weight.tensors[0]
    if first is None or not first.is_floating_point() or first.dtype == A.dtype:
        product: Tensor = linear(A, weight)
        return product.T
    return torch.cat([part.to(A.dtype) @ A.T for part in _in_parts(first)])


@Operation
def dora_norms(weight: Weight, A: Tensor, B: Tensor, scaling: float, squares: Tensor) -> Tensor:
    """Return |w + s b A| for each row w of W and b of B; float32 [out_features], no gradient.

    From |w|² + 2 s b·(A w) + s² b (A Aᵀ) bᵀ, in which `squares` holds |w|²: one product of W with
    as many rows as the rank, and no dense W + s B A. It is an operation of its own so that the
    checkpointing of layers, which chooses among products, does not see the product inside.
    """
    moved = (2 * scaling) * _times(weight, A) + (scaling * scaling) * (B @ (A @ A.T))
    # What is left of a row that the update cancels may round below 0.
    return (squares + (B * moved).sum(1)).clamp_min(0).sqrt()


@dora_norms.register_fake
def _(weight: Weight, A: Tensor, B: Tensor, scaling: float, squares: Tensor) -> Tensor:
    return torch.empty_like(squares)


class _WithDora(Method):
    """What `--dora` changes in a method that adds LoRA to its weights."""

    plain: ClassVar[str]
    """The method that it changes."""
    adapter = DoraAdapter
    takes = frozenset({"dropout", "adapter_bias", "dora"})
    whys = {"dora": "it scales the rows of a weight with its update, and method {} adds none"}

    def title(self, config: AdapterConfig) -> str:
        """Return the method in words."""
        return f"{self.plain} with DoRA"

    def resolved(self, config: Config, bits: int | None) -> Config:
        """Return the configuration with its defaults filled in, and the flag set."""
        return replace(super().resolved(config, bits), dora=True)

    def problems(self, config: AdapterConfig) -> list[str]:
        """Return which of its options contradict each other."""
        if not config.adapter_bias:
            return []
        return [
            "--dora and --adapter-bias: the magnitudes scale the weight alone, and PEFT reads no "
            "DoRA with a bias; drop one of them"
        ]

    def kept(self, layer: AdaptedLinear, config: AdapterConfig, dtype: torch.dtype) -> Kept:
        """Return LoRA's, the output before it is scaled, and the factors."""
        out_features, rank = layer.base.out_features, config.update_rank
        fused = Kept((out_features + rank,), True, rank + out_features, 4 * out_features)
        if not config.dropout:
            return fused
        # W times what is dropped is another product, beside a copy of the input and the mask.
        return replace(
            fused,
            keeps_input=False,
            products=(out_features, *fused.products),
            per_token=fused.per_token + 2 * layer.base.in_features,
        )

    def reads(self, own: str | None, peft: Mapping[str, Any]) -> bool:
        """Return whether PEFT's files hold a DoRA."""
        return own in (None, DoraAdapter.method) and bool(peft.get("use_dora"))


class Dora(_WithDora, Lora):
    """DoRA on the weights as they are."""

    name, plain = "dora", Lora.name
    on_quantised = "qdora"


class QDora(_WithDora, QLora):
    """DoRA on 4-bit NormalFloat."""

    name, plain = "qdora", QLora.name


DORA, QDORA = Dora(), QDora()
