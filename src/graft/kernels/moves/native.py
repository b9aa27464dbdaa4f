"""Statistics that move, by the native kernels (csrc/grids.inc)."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.kernels.backend.native_library import COMPUTE, DTYPES, address, call, native
from graft.kernels.frozen.native import grad_statistics
from graft.kernels.low_rank.native import pool, token_product
from graft.kernels.low_rank.reference import hidden_and_gradient
from graft.kernels.moves import reference
from graft.kernels.packed.weight import Weight


@native.implements("move_offsets")
def move_offsets(
    offsets: Tensor, A: Tensor, B: Tensor, scaling: float, stored: torch.dtype
) -> Tensor:
    """Compute stored(offsets + scaling B A) in float64, as float32 [out_features, groups]."""
    if stored not in (torch.float32, torch.float16) or A.dtype != torch.float32:
        return reference.move_offsets(offsets, A, B, scaling, stored)
    # Offsets that an adapter has moved come as float32 but hold numbers of the stored dtype.
    return _moved(offsets.to(stored).contiguous(), A, B, scaling, stored)


def _moved(
    start: Tensor | None, A: Tensor, B: Tensor, scaling: float, stored: torch.dtype
) -> Tensor:
    """Return `move_offsets` from a contiguous start, or from zeros."""
    down, up = A.contiguous(), B.contiguous()
    out = A.new_empty((B.shape[0], A.shape[1]))
    sizes = (*out.shape, A.shape[0])
    begin = None if start is None else address(start)
    operands = begin, address(up), address(down)
    call("move_offsets", DTYPES[stored], *operands, *sizes, scaling, address(out))
    return out


@native.implements("move_scaled")
def move_scaled(values: Tensor, scales: Tensor, moves: Tensor, stored: torch.dtype) -> Tensor:
    """Compute values + scales * moves in float64, rounded once to the stored dtype."""
    if stored not in (torch.float32, torch.float16) or moves.dtype != torch.float32:
        return reference.move_scaled(values, scales, moves, stored)
    start, units, steps = values.to(stored).contiguous(), scales.to(stored).contiguous(), moves
    out = torch.empty_like(start)
    operands = address(start), address(units), address(steps.contiguous())
    call("move_scaled", DTYPES[stored], *operands, out.numel(), address(out))
    return out


@native.implements("move_by_factors")
def move_by_factors(
    scales: Tensor, offsets: Tensor, A: Tensor, B: Tensor, scaling: float, u_A: Tensor, u_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute scales (1 + u_B u_A) and offsets + scaling B A, each rounded as it is stored."""
    if u_A.dtype != torch.float32:
        return reference.move_by_factors(scales, offsets, A, B, scaling, u_A, u_B)
    u = _moved(None, u_A, u_B, 1.0, torch.float32)
    moved_scales = move_scaled(scales, scales, u, scales.dtype)
    return moved_scales, move_offsets(offsets, A, B, scaling, offsets.dtype)


@native.implements("grad_factors")
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
    """Compute those of A and B from group sums of x, and those of u_A and u_B from a product.

    What that multiplies is rounded to 7 bits with AVX2 and AVX-512, but for 2-bit codes, where a
    run ended worse with it by more than seeds differ.
    """
    if x.dtype not in COMPUTE:
        return reference.grad_factors(grad, x, weight, A, B, scaling, u_A, u_B)
    pooled = pool(x, weight.layout.group_size)
    hidden, grad_hidden = hidden_and_gradient(grad, pooled, A, B, scaling)
    d_A, d_B = token_product(grad_hidden, pooled), token_product(grad, hidden)
    scales, _ = weight.statistics
    d_u, _ = grad_statistics(grad, x, weight, scales, rounds=weight.layout.bits > 2)
    return d_A, d_B, u_B.T @ d_u, d_u @ u_A.T
