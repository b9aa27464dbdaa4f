"""QA-LoRA: a low-rank update that is constant in each group, so that the offsets absorb it.

The scales can move beside the offsets; they too are absorbed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from graft.adapters.base import Adapter, lora_scaling, low_rank_moves, scaled_codes
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
        self.A = nn.Parameter(torch.empty(self.rank, groups, device=device))
        self.B = nn.Parameter(torch.zeros(out_features, self.rank, device=device))
        if self.rank == groups:
            nn.init.eye_(self.A)
            with torch.no_grad():
                self.A.mul_(math.sqrt(rank / in_features))
        else:
            bound = 1 / math.sqrt(in_features)
            nn.init.uniform_(self.A, -bound, bound)
        self.grid_rank = min(grid_rank, groups)
        if self.grid_rank:
            self.u_A, self.u_B = low_rank_moves(self.grid_rank, out_features, groups, device)

    def grid_update(self, packed: Packed) -> GridUpdate:
        """Return offsets += s B A, summed in float64, and scales += scale u."""
        scales = Scaled(low_rank_product(self.u_A, self.u_B)) if self.grid_rank else None
        return GridUpdate(scales=scales, offsets=LowRank(self.A, self.B, self.scaling))

    def fused_output(self, x: Tensor, base: FrozenLinear) -> Tensor | None:
        """Return x W'ᵀ, W' with moved statistics.

        The gradients of moved offsets alone are formed from the group sums of x; those of scales
        need x itself, and bring the offsets' with them.
        """
        if not isinstance(base.weight_format, IntGroupFormat):
            return None
        operands = *base.weight_format.operands(base.packed), self.A, self.B, self.scaling
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
            move += scaled_codes(base, low_rank_product(self.u_A, self.u_B))
        return move
