"""QA-LoRA: a low-rank update that is constant in each group, so that the offsets absorb it.

The scales can move beside the offsets; they too are absorbed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from graft.adapters.adapted import AdaptedLinear
from graft.adapters.base import (
    Adapter,
    StoredAdapter,
    fill,
    lora_scaling,
    low_rank_moves,
    low_rank_start,
    require_format,
    scaled_codes,
)
from graft.adapters.config import AdapterConfig
from graft.adapters.lora import low_rank, scaling_of
from graft.adapters.method import Config, Kept, Method, narrow_solver
from graft.adapters.rates import low_rank_moves_factors, low_rank_rate
from graft.errors import GraftError
from graft.formats.base import GridUpdate, LowRank, Packed, Scaled
from graft.formats.int_group import IntGroupFormat
from graft.kernels.low_rank.ops import low_rank_product, qalora_linear
from graft.kernels.moves.ops import qalora_grid_linear
from graft.layers.frozen import FrozenLinear


class QALoraAdapter(Adapter):
    """y = W x + s B A groupsum(x), with s = alpha/rank, W's scales times 1 + u.

    That is W x with every group's offset moved by s (B A)[out, group] (QA-LoRA, arXiv 2309.14717,
    section 3.3). A: float32 [rank, groups]; B: float32 [out_features, rank], zero.
    u = u_B u_A [out_features, groups], of rank grid_rank at most, zero at first; with grid_rank 0
    the scales stay, and the update is an ordinary LoRA.

    The forward moves the offsets and rounds them as they are stored, with the gradient passed
    straight through, so that what is trained is what is deployed.

    The rank is at most the number of groups, with which every move of the offsets has one: then A
    starts as a multiple of the identity and B holds the moves themselves, which train better than
    the products of a random A. The multiple is sqrt(rank / in_features), with the rank that was
    asked for: A's columns are sqrt(3) times as long as those of a random one.

    A random A is uniform within 1/sqrt(in_features), as LoRA's is, though it has only `groups`
    columns: the group sum grows with sqrt(group_size), so A groupsum(x) starts as large as LoRA's
    A x, and a step of Adam in an element of A or B moves the output as far as in LoRA. Drawn from
    the number of groups instead, A would be sqrt(group_size) times larger, and LoRA's learning rate
    too high.
    """

    method = "qalora"
    peft_names = {"A": "lora_A.weight", "B": "lora_B.weight"}
    scaling: float
    moves_grid = True
    needed_format = "int"
    own_names = ("A", "B", "u_A", "u_B")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int,
        rank: int,
        alpha: float | None = None,
        rslora: bool = False,
        grid_rank: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        groups = -(-in_features // group_size)
        self.rank = min(rank, groups)
        self.group_size = group_size
        self.scaling = lora_scaling(rank, alpha, rslora)
        if self.rank == groups:
            start = torch.eye(groups, device=device) * math.sqrt(rank / in_features)
            self.A = nn.Parameter(start)
            self.B = nn.Parameter(torch.zeros(out_features, groups, device=device))
        else:
            self.A, self.B = low_rank_start(self.rank, groups, out_features, device, in_features)
        self.grid_rank = min(grid_rank, groups)
        if self.grid_rank:
            self.u_A, self.u_B = low_rank_moves(self.grid_rank, out_features, groups, device)

    @classmethod
    def from_layer(cls, layer: FrozenLinear, config: AdapterConfig) -> Self:
        """Return a fresh adapter, which changes nothing yet."""
        return cls(
            layer.in_features,
            layer.out_features,
            require_format(layer, IntGroupFormat, cls).group_size,
            config.update_rank,
            config.alpha,
            config.rslora,
            config.grid_rank or 0,
            next(layer.parameters()).device,
        )

    @classmethod
    def from_stored(cls, layer: FrozenLinear, stored: StoredAdapter) -> Self:
        """Return the adapter of PEFT's files, or of our own where the scales move too."""
        weight_format = require_format(layer, IntGroupFormat, cls)
        rank, sizes = low_rank(stored), (layer.in_features, layer.out_features)
        group_size, moves = weight_format.group_size, stored.tensors.get("u_A")
        grid_rank = 0 if moves is None else moves.shape[0]
        found = int(stored.peft.get("qalora_group_size", 16)) if stored.peft else group_size
        if found != group_size:
            raise GraftError(f"its group size is {found}, the base's is {group_size}")
        adapter = cls(*sizes, group_size, rank, grid_rank=grid_rank)
        if stored.peft:
            # PEFT knows no bound: B A of a larger rank is kept as the file has it.
            adapter.rank = rank
            adapter.A = nn.Parameter(torch.empty(rank, weight_format.groups(layer.in_features)))
            adapter.B = nn.Parameter(torch.empty(layer.out_features, rank))
        adapter.scaling = scaling_of(stored, _pool_factor(layer.in_features, group_size))
        fill(adapter, stored.tensors)
        return adapter

    def grid_update(self, packed: Packed) -> GridUpdate:
        """Return offsets += s B A, summed in float64, and scales += scale u."""
        scales = Scaled(low_rank_product(self.u_A, self.u_B)) if self.grid_rank else None
        return GridUpdate(scales=scales, offsets=LowRank(self.A, self.B, self.scaling))

    def fused_output(self, x: Tensor, base: FrozenLinear) -> Tensor | None:
        """Return x W'ᵀ, W' with moved statistics.

        The gradients of moved offsets are formed from the group sums of x; those of scales need x
        itself.
        """
        if base.weight_format.integers is None:
            return None
        operands = base.kernel_weight(), self.A, self.B, self.scaling
        y: Tensor
        if self.grid_rank:
            y = qalora_grid_linear(x, *operands, self.u_A, self.u_B)
        else:
            y = qalora_linear(x, *operands)[0]
        return y

    def expanded_a(self, in_features: int) -> Tensor:
        """Return A repeated over each group, [rank, in_features]: this adapter as plain LoRA."""
        return self.A.repeat_interleave(self.group_size, dim=-1)[:, :in_features]

    def delta(self, base: FrozenLinear) -> Tensor:
        """Return the unrounded move of the weight, scale u q + s B A; float64 [out, in]."""
        move = (self.B.double() @ self.expanded_a(base.in_features).double()) * self.scaling
        if self.grid_rank:
            move += scaled_codes(base, low_rank_product(self.u_A, self.u_B), self.group_size)
        return move

    # Its files ---------------------------------------------------------------------------------

    def lora_tensors(self, base: FrozenLinear, as_lora: bool) -> dict[str, Tensor] | None:
        """Return A and B, A repeated group-wise for an ordinary LoRA; None where scales move."""
        if self.grid_rank:
            return None
        return {"A": self.expanded_a(base.in_features) if as_lora else self.A, "B": self.B}

    def peft_settings(self, as_lora: bool) -> dict[str, Any]:
        """Return the size of the groups."""
        return {"use_qalora": not as_lora, "qalora_group_size": self.group_size}

    def peft_factor(self, base: FrozenLinear, as_lora: bool) -> float:
        """Return PEFT's pooled input over ours."""
        return 1.0 if as_lora else _pool_factor(base.in_features, self.group_size)

    def why_no_lora(self) -> str:
        """Return how it is deployed instead, in words."""
        return "Export the merged model, or train it with --grid-rank 0"


def _pool_factor(in_features: int, group_size: int) -> float:
    """Return PEFT's QA-LoRA input over ours: mean * groups = sum * (groups / group_size)."""
    return (in_features // group_size) / group_size


class QALora(Method):
    """QA-LoRA on group-wise integers, which absorb its update."""

    name = "qalora"
    adapter = QALoraAdapter
    takes = frozenset({"grid_rank"})
    default_format = "int"
    formats = ("int",)
    merges_exactly = True

    def resolved(self, config: Config, bits: int | None) -> Config:
        """Return the configuration with grid_rank filled in: the rank, so that the scales move."""
        grid_rank = config.update_rank if config.grid_rank is None else config.grid_rank
        return dataclasses.replace(config, rank=config.update_rank, grid_rank=grid_rank)

    def default_solver(self, bits: int | str | None) -> str:
        """Return a calibrated solver where what narrow codes lose stays lost."""
        return narrow_solver(bits)

    def learning_rate(self, config: AdapterConfig, hidden_size: int) -> float:
        """Return 0.7 of LoRA's: what going back to a known text wants; a new task takes either."""
        return 0.7 * low_rank_rate(config, hidden_size)

    def rate_factors(
        self, config: AdapterConfig, hidden_size: int, bits: Mapping[str, int]
    ) -> dict[str, float]:
        """Return a grid's rate for the moves of the scales."""
        return low_rank_moves_factors(config, hidden_size, bits)

    def kept(self, layer: AdaptedLinear, config: AdapterConfig, dtype: torch.dtype) -> Kept:
        """Return the group sums of the input where the scales stay, else the input."""
        out_features = layer.base.out_features
        if config.grid_rank:
            return Kept((out_features,))
        groups = layer.base.packed["offsets"].shape[-1]
        return Kept((out_features + groups,), False, groups)

    def reads(self, own: str | None, peft: Mapping[str, Any]) -> bool:
        """Return whether files are its own, or PEFT's QA-LoRA."""
        return own == self.name or (own is None and bool(peft.get("use_qalora")))

    def unsaid(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return scales that stay: version 0.1.0 and PEFT know no moves of them."""
        return {"grid_rank": 0} if settings.get("grid_rank") is None else {}

    def peft_problem(self, config: AdapterConfig) -> str | None:
        """Return why PEFT cannot hold it while its scales move."""
        if config.grid_rank == 0:
            return None
        return "qalora moves the scales too, which no LoRA can; give --grid-rank 0, or drop it"


QALORA = QALora()
