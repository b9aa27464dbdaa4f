"""QA-LoRA: a low-rank update that is constant in each group, so that the offsets absorb it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from graft.adapters.base import Adapter, lora_scaling
from graft.formats.base import GridUpdate, Packed
from graft.formats.linear import FrozenLinear


class QALoraAdapter(Adapter):
    """y = W x + s B A groupsum(x), with s = (alpha/rank) / sqrt(group_size).

    That is W x with every group's offset moved by s (B A)[out, group] (QA-LoRA, arXiv 2309.14717,
    section 3.3). A: float32 [rank, groups], random; B: float32 [out_features, rank], zero.

    The forward moves the offsets and rounds them as they are stored, with the gradient passed
    straight through, so that what is trained is what is deployed.

    Why sqrt(group_size): the paper's pooled input sums group_size features, so its RMS is
    sqrt(group_size) times that of one feature, and so is the step that one Adam update of B makes
    in the output. Dividing by it lets LoRA's learning rate hold for QA-LoRA.
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
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        groups = -(-in_features // group_size)
        self.rank = rank
        self.group_size = group_size
        self.scaling = lora_scaling(rank, alpha, rslora) / math.sqrt(group_size)
        self.A = nn.Parameter(torch.empty(rank, groups, device=device))
        self.B = nn.Parameter(torch.zeros(out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def grid_update(self, packed: Packed) -> GridUpdate:
        """Return offsets += s B A, accumulated in float64 so that its rounding is reproducible."""
        return GridUpdate(offsets=(self.B.double() @ self.A.double()) * self.scaling)

    def expanded_a(self, in_features: int) -> Tensor:
        """Return A repeated over each group, [rank, in_features]: this adapter as plain LoRA."""
        return self.A.repeat_interleave(self.group_size, dim=-1)[:, :in_features]

    def delta(self, base: FrozenLinear) -> Tensor:
        """Return s B A repeated over each group, float64 [out_features, in_features]."""
        return (self.B.double() @ self.expanded_a(base.in_features).double()) * self.scaling
