"""Statistics that move, in plain PyTorch: taken in float64, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.kernels.backend.reference import reference
from graft.kernels.backend.registry import implementation
from graft.kernels.packed.weight import Weight


@reference.implements("move_offsets")
def move_offsets(
    offsets: Tensor, A: Tensor, B: Tensor, scaling: float, stored: torch.dtype
) -> Tensor:
    """Compute stored(offsets + scaling B A) in float64, as float32 [out_features, groups]."""
    update = (B.double() @ A.double()) * scaling
    return round_once(offsets.double() + update, stored).float()


@reference.implements("move_scaled")
def move_scaled(values: Tensor, scales: Tensor, moves: Tensor, stored: torch.dtype) -> Tensor:
    """Compute values + scales * moves in float64, rounded once to the stored dtype."""
    return round_once(values.double() + scales.double() * moves, stored)


@reference.implements("move_by_factors")
def move_by_factors(
    scales: Tensor, offsets: Tensor, A: Tensor, B: Tensor, scaling: float, u_A: Tensor, u_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute scales (1 + u_B u_A) and offsets + scaling B A, each rounded as it is stored.

    The offsets are handed out as float32.
    """
    nothing = u_A.new_zeros(u_B.shape[0], u_A.shape[1])
    u = move_offsets(nothing, u_A, u_B, 1.0, torch.float32)
    moved_scales = move_scaled(scales, scales, u, scales.dtype)
    return moved_scales, move_offsets(offsets, A, B, scaling, offsets.dtype)


@reference.implements("grad_factors")
def grad_factors(
    grad: Tensor,
    x: Tensor,
    weight: Weight,
    A: Tensor,
    B: Tensor,
    scaling: float,
    u_A: Tensor,
    u_B: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute all four gradients from those of the statistics, which one product gives."""
    scales, _ = weight.statistics
    statistics = implementation("int_group_grad_statistics", x.device)
    d_scales, d_offsets = statistics(grad, x, weight, None)
    d_u, d_offsets = d_scales * scales, d_offsets * scaling
    return B.T @ d_offsets, d_offsets @ A.T, u_B.T @ d_u, d_u @ u_A.T


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 to the nearest float16 or float32; torch itself goes by way of float32."""
    nearest = values.float()
    if dtype != torch.float16:
        return nearest
    # Toward zero, with an odd last bit where that loses something: no tie arises that was none.
    too_far = nearest.double().abs() > values.abs()
    near_zero = torch.where(too_far, nearest.nextafter(torch.zeros_like(nearest)), nearest)
    inexact = (near_zero.double() != values).int()
    return (near_zero.view(torch.int32) | inexact).view(torch.float32).half()
