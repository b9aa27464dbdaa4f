"""The one operation that DoRA adds to a low-rank layer: the norms of the updated weight's rows."""

from __future__ import annotations

import torch
from torch import Tensor

import graft.kernels.backends  # noqa: F401  (registers them)
from graft.kernels.backend.operation import Operation
from graft.kernels.backend.registry import implementation
from graft.kernels.packed.weight import Weight


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
    if weight.layout.kind != "dense" or first is None or first.dtype == A.dtype:
        product: Tensor = implementation("linear", A.device)(A, weight)
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
