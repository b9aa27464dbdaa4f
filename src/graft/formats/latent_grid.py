"""What training inside the rounding asks of a grid, and how any grid does it on the reference."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from graft.formats.base import GridFormat, LowRank, Packed
from graft.kernels.frozen.ops import grad_input, linear
from graft.kernels.latent.ops import kept_weight
from graft.kernels.low_rank.ops import token_product
from graft.kernels.packed.weight import Weight

_PIECE = 1 << 18
"""Weights that are computed in float64 at once."""


class LatentGrid(GridFormat):
    """A grid that a weight can be rounded to anew for each update, its statistics fixed.

    A grid says how a whole weight is rounded to it and how far it reaches; with kernels of its own
    it overrides `round_latent` and `latent_linear`, which compute on the reference here.
    """

    latent_workspace: ClassVar[int] = 40
    """Bytes per weight that `latent_linear` needs at once. Here 16 of them are tensors, the updated
    weight, its codes and gradient among them; the rest are the gaps that such tensors
    leave in the heap, found by benchmarks/plan.py."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits per code."""

    @property
    @abstractmethod
    def group_size(self) -> int:
        """Weights that share a statistic."""

    @abstractmethod
    def pack_grid(self, grid: Packed) -> dict[str, Tensor]:
        """Return a fitted grid's statistics as they are stored."""

    @abstractmethod
    def keep_within(self, values: Tensor, codes: Tensor, grid: Packed) -> Tensor:
        """Return the values, each moved into the range that rounds to its code; float64.

        values [out_features, in_features]; codes uint8 of that shape; grid as `fit_grid` gives it.
        Beyond the grid's ends there is no bound.
        """

    @abstractmethod
    def round_to(self, weight: Tensor, grid: Packed) -> dict[str, Tensor]:
        """Return the packed weight nearest to a weight float32 [out_features, in_features].

        grid: the stored statistics, which stay.
        """

    @abstractmethod
    def reaches(self, weight: Tensor, grid: Packed) -> Tensor:
        """Return which elements lie within the grid or half a step beyond; bool [out, in]."""

    def round_latent(self, kept: Weight, grid: Packed, update: LowRank | None) -> dict[str, Tensor]:
        """Return the packed weight nearest to W + update; kept: W as it is kept."""
        low_rank = (None, None, 1.0) if update is None else (update.A, update.B, update.scaling)
        return self.round_to(_updated(kept, *low_rank), grid)

    def latent_linear(
        self,
        x: Tensor,
        kept: Weight,
        grid: Packed,
        update: LowRank,
        u: Tensor | None,
        v: Tensor | None,
    ) -> Tensor:
        """Return y = x Wᵀ for the rounded weight, differentiable in x, A, B, u and v.

        The gradient passes straight through the rounding where W + update lies within the grid's
        range. u and v move scales and offsets, which this grid has not: they are None.
        """
        assert u is None and v is None, "a grid without offsets does not move"
        low_rank = update.A, update.B, update.scaling
        y: Tensor = _RoundedLinear.apply(x, *low_rank, self, kept, grid)  # type: ignore[no-untyped-call]
        return y


def _updated(kept: Weight, A: Tensor | None, B: Tensor | None, scaling: float) -> Tensor:
    """Return W + scaling B A, float32, summed in float64 and rounded once."""
    weight = kept_weight(kept)
    if A is None or B is None:
        return weight.float()
    # A few rows at a time, as float64 would be the largest tensor of a training step.
    out = torch.empty(weight.shape, device=weight.device)
    A = A.double()
    rows = max(1, _PIECE // weight.shape[1])
    for some, of_B, into in zip(weight.split(rows), B.split(rows), out.split(rows), strict=True):
        into.copy_(some.double().addmm_(of_B.double(), A, alpha=scaling))
    return out


class _RoundedLinear(torch.autograd.Function):
    """y = x round(W + s B A)ᵀ, with dA = s Bᵀ m(dyᵀ x), dB = s m(dyᵀ x) Aᵀ.

    m keeps what lies within the grid's range (the straight-through estimator of L4Q, arXiv
    2402.04902). Codes are not kept between the passes: the weight is rounded in each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        scaling: float,
        grid: LatentGrid,
        kept: Weight,
        statistics: Packed,
    ) -> Tensor:
        ctx.save_for_backward(x, A, B)
        ctx.grid, ctx.kept, ctx.statistics, ctx.scaling = grid, kept, statistics, scaling
        packed = grid.round_latent(kept, statistics, LowRank(A, B, scaling))
        y: Tensor = linear(x, grid.kernel_weight(packed, B.shape[0], x.shape[-1]))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B = ctx.saved_tensors
        grid, scaling, grad = ctx.grid, ctx.scaling, grads[0].contiguous()
        moved = _updated(ctx.kept, A, B, scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            packed = grid.round_to(moved, ctx.statistics)
            grad_x = grad_input(grad, grid.kernel_weight(packed, B.shape[0], x.shape[-1]))
        reached = grid.reaches(moved, ctx.statistics)
        del moved
        within = token_product(grad, x).mul_(reached)
        return grad_x, (B.T @ within) * scaling, (within @ A.T) * scaling, *4 * [None]
