"""What training inside the rounding asks of a grid, and how any grid does it on the reference."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from graft.formats.base import GridFormat, LowRank, Packed
from graft.kernels.frozen.reference import frozen_product
from graft.kernels.latent.ops import kept_weight
from graft.kernels.low_rank.ops import token_product

Kept = tuple[Tensor, Tensor | None, Tensor | None]
"""A latent weight as it is kept: the tensor and, where that holds 8-bit codes, their scales and
offsets."""


@runtime_checkable
class LatentGrid(GridFormat, Protocol):
    """A grid that a weight can be rounded to anew for each update, its statistics fixed."""

    @property
    def bits(self) -> int:
        """Bits per code."""
        ...

    @property
    def group_size(self) -> int:
        """Weights that share a statistic."""
        ...

    def pack_grid(self, grid: Packed) -> dict[str, Tensor]:
        """Return a fitted grid's statistics as they are stored."""
        ...

    def keep_within(self, values: Tensor, codes: Tensor, grid: Packed) -> Tensor:
        """Return the values, each moved into the range that rounds to its code; float64.

        values [out_features, in_features]; codes uint8 of that shape; grid as `fit_grid` gives it.
        Beyond the grid's ends there is no bound.
        """
        ...

    def round_latent(self, kept: Kept, grid: Packed, update: LowRank | None) -> dict[str, Tensor]:
        """Return the packed weight nearest to W + update; grid holds the stored statistics."""
        ...

    def latent_linear(
        self,
        x: Tensor,
        kept: Kept,
        grid: Packed,
        update: LowRank,
        u: Tensor | None,
        v: Tensor | None,
    ) -> Tensor:
        """Return y = x Wᵀ for the rounded weight, differentiable in x, A, B, u and v.

        The gradient passes straight through the rounding where W + update lies within the grid's
        range. u and v move its scales and offsets, where it has such and they train.
        """
        ...


class ReferenceLatent:
    """`LatentGrid` for any grid that can round a whole weight and say where it reaches."""

    def round_to(self, weight: Tensor, grid: Packed) -> dict[str, Tensor]:
        """Return the packed weight nearest to a weight float32 [out_features, in_features]."""
        raise NotImplementedError

    def reaches(self, weight: Tensor, grid: Packed) -> Tensor:
        """Return which elements lie within half a step of the grid; bool [out, in]."""
        raise NotImplementedError

    def round_latent(self, kept: Kept, grid: Packed, update: LowRank | None) -> dict[str, Tensor]:
        """Return the packed weight nearest to W + update, taken in float64 and rounded once."""
        low_rank = (None, None, 1.0) if update is None else (update.A, update.B, update.scaling)
        return self.round_to(_updated(kept, self.group_size, *low_rank), grid)  # type: ignore[attr-defined]

    def latent_linear(
        self,
        x: Tensor,
        kept: Kept,
        grid: Packed,
        update: LowRank,
        u: Tensor | None,
        v: Tensor | None,
    ) -> Tensor:
        """Return y = x Wᵀ, W rounded once in the forward pass and once more in the backward one."""
        assert u is None and v is None, "a grid without offsets does not move"
        low_rank = update.A, update.B, update.scaling
        y: Tensor = _RoundedLinear.apply(x, *low_rank, self, kept, grid)  # type: ignore[no-untyped-call]
        return y


def _updated(
    kept: Kept, group_size: int, A: Tensor | None, B: Tensor | None, scaling: float
) -> Tensor:
    """Return W + scaling B A, float32, summed in float64 in one order everywhere."""
    weight = kept_weight(*kept, group_size)
    if A is None or B is None:
        return weight.float()
    return (weight.double() + (B.double() @ A.double()) * scaling).float()


class _RoundedLinear(torch.autograd.Function):
    """y = x round(W + s B A)ᵀ, with dA = s Bᵀ m(dyᵀ x), dB = s m(dyᵀ x) Aᵀ.

    m keeps what lies within the grid's range (the straight-through estimator of L4Q, arXiv
    2402.04902). Codes are not kept between the passes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        scaling: float,
        grid: Any,
        kept: Kept,
        fixed: Packed,
    ) -> Tensor:
        weight, weight_scales, weight_offsets = kept
        ctx.save_for_backward(x, A, B, weight, weight_scales, weight_offsets)
        ctx.grid, ctx.fixed, ctx.scaling = grid, fixed, scaling
        packed = grid.round_latent(kept, fixed, LowRank(A, B, scaling))
        y: Tensor = grid.linear(x, packed, B.shape[0])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, *kept = ctx.saved_tensors
        grid, scaling, grad = ctx.grid, ctx.scaling, grads[0].contiguous()
        moved = _updated(tuple(kept), grid.group_size, A, B, scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            packed = grid.round_to(moved, ctx.fixed)
            grad_x = frozen_product(
                "grad_input", grad, grid.kernel_weight(packed, B.shape[0], x.shape[-1])
            )
        within = token_product(grad, x) * grid.reaches(moved, ctx.fixed)
        grad_A, grad_B = (B.T @ within) * scaling, (within @ A.T) * scaling
        return grad_x, grad_A, grad_B, *4 * [None]
