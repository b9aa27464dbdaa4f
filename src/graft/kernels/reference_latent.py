"""The plain PyTorch implementation of the latent weight's operations."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.kernels.packing import pack_codes
from graft.kernels.reference import reference


def _steps(
    weight: Tensor,
    scales: Tensor,
    offsets: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    scaling: float,
    group_size: int,
) -> Tensor:
    """Return (W + scaling B A - offset) / scale before it is rounded, float32 [out, in].

    Each product and each sum is rounded on its own, the terms of B A in their order.
    """
    latent = weight.float()
    if A is not None and B is not None:
        update = B[:, :1] * A[:1]
        for row in range(1, A.shape[0]):
            update += B[:, row : row + 1] * A[row : row + 1]
        latent = latent + scaling * update
    group = torch.arange(weight.shape[1], device=weight.device) // group_size
    return (latent - offsets.float()[:, group]) / scales.float()[:, group]


@reference.implements("latent_codes")
def latent_codes(
    weight: Tensor,
    scales: Tensor,
    offsets: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    scaling: float,
    bits: int,
    group_size: int,
) -> tuple[Tensor, Tensor | None]:
    """Round the latent weight to codes and pack them."""
    steps = _steps(weight, scales, offsets, A, B, scaling, group_size)
    codes = steps.round_().clamp_(0, (1 << bits) - 1).to(torch.uint8)
    planes = pack_codes(codes, bits)
    return planes[0], planes[1] if len(planes) > 1 else None


@reference.implements("latent_grads")
def latent_grads(
    product: Tensor,
    weight: Tensor,
    scales: Tensor,
    offsets: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    bits: int,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dW = product within the grid's range, and du and dv from its group sums."""
    rounded = _steps(weight, scales, offsets, A, B, scaling, group_size).round_()
    codes = rounded.clamp(0, (1 << bits) - 1)
    short = -product.shape[1] % group_size

    def group_sums(values: Tensor) -> Tensor:
        padded: Tensor = torch.nn.functional.pad(values, (0, short))
        sums: Tensor = padded.unflatten(-1, (-1, group_size)).sum(-1)
        return sums

    grad_u = group_sums(product * codes) * scales
    grad_v = group_sums(product) * scales
    return product * (codes == rounded), grad_u, grad_v
