"""Merge-aware training: LoRA inside the quantiser, so that the update chooses the codes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from graft.adapters.base import Adapter, lora_scaling, low_rank_moves
from graft.formats.base import GridUpdate, LowRank, Packed, Scaled
from graft.formats.latent import LatentFormat
from graft.kernels.latent.ops import latent_linear
from graft.kernels.low_rank.ops import lora_linear, low_rank_product, operands
from graft.layers.frozen import FrozenLinear

GRID_PARAMETERS = ("u_A", "u_B", "v_A", "v_B")


class MergeAwareAdapter(Adapter):
    """w = scale (1 + u) round((W + s B A - offset) / scale) + offset + scale v, s = alpha/rank.

    A: float32 [rank, in_features], random as LoRA's; B: float32 [out_features, rank], zero;
    u = u_B u_A and v = v_B v_A [out_features, groups], of rank grid_rank at most (0: the grid
    stays), u_B and v_B zero. A low-rank update flips codes, as in L4Q (arXiv
    2402.04902), and the grid moves in units of its own scales, as in affine tuning. What is trained
    is the int weight itself: the forward computes with the very codes, scales and offsets that a
    merge keeps. It needs a base in the latent format.

    Before the base is rounded it is LoRA: x Wᵀ + s (x Aᵀ) Bᵀ.
    """

    method = "merge_aware"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        groups: int,
        rank: int,
        alpha: float | None = None,
        rslora: bool = False,
        grid_rank: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.rank = rank
        self.scaling = lora_scaling(rank, alpha, rslora)
        self.A = nn.Parameter(torch.empty(rank, in_features, device=device))
        self.B = nn.Parameter(torch.zeros(out_features, rank, device=device))
        bound = 1 / math.sqrt(in_features)
        nn.init.uniform_(self.A, -bound, bound)
        self.grid_rank = min(grid_rank, groups)
        if self.grid_rank:
            sizes = self.grid_rank, out_features, groups, device
            self.u_A, self.u_B = low_rank_moves(*sizes)
            self.v_A, self.v_B = low_rank_moves(*sizes)

    def grid_update(self, packed: Packed) -> GridUpdate:
        """Return weights += s B A, scales += scale u, offsets += scale v."""
        weights = LowRank(self.A, self.B, self.scaling)
        u, v = self._moves()
        if u is None or v is None:
            return GridUpdate(weights=weights)
        return GridUpdate(scales=Scaled(u), offsets=Scaled(v), weights=weights)

    def update(self) -> Tensor:
        """Return s B A, float32 [out_features, in_features]."""
        return ((self.B.double() @ self.A.double()) * self.scaling).float()

    def grid_parameters(self) -> list[nn.Parameter]:
        """Return what moves the grid."""
        return [self.get_parameter(name) for name in GRID_PARAMETERS if self.grid_rank]

    def _moves(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Return u and v, float32 [out_features, groups], or nothing for a grid that stays."""
        if not self.grid_rank:
            return None, None
        u_A, u_B, v_A, v_B = self.grid_parameters()
        return low_rank_product(u_A, u_B), low_rank_product(v_A, v_B)

    def fused_output(self, x: Tensor, base: FrozenLinear) -> Tensor | None:
        """Return x W'ᵀ, W' the int weight that a merge keeps, with gradients of all that trains.

        On a base that is not rounded yet it is LoRA, and the grid gets no gradient.
        """
        weight_format = base.weight_format
        if not isinstance(weight_format, LatentFormat):
            return None
        if not weight_format.rounds:
            weight = operands(base.kernel_weight())
            out: Tensor = lora_linear(x, *weight, self.A, self.B, self.scaling)[0]
            return out
        packed = base.packed
        y: Tensor = latent_linear(
            x,
            *weight_format.kept_operands(packed),
            packed["scales"],
            packed["offsets"],
            self.A,
            self.B,
            self.scaling,
            *self._moves(),
            weight_format.bits,
            weight_format.group_size,
        )
        return y

    def delta(self, base: FrozenLinear) -> Tensor:
        """Return the int weight after the update minus the one before, float64 [out, in]."""
        with torch.no_grad():
            moved = base.weight_format.absorb(base.packed, self.grid_update(base.packed))
            after = base.dense_weight(torch.float32, moved).double()
            return after - base.dense_weight(torch.float32).double()
