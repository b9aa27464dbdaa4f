"""The plain PyTorch implementation of the latent weight's operations."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.kernels.backend.reference import reference
from graft.kernels.packed.planes import pack_codes
from graft.kernels.packed.weight import Latent


def _steps(latent: Latent) -> Tensor:
    """Return (W + scaling B A - offset) / scale before it is rounded, float32 [out, in].

    Each product and each sum is rounded on its own, the terms of B A in their order.
    """
    weight, scales, offsets, A, B, scaling, _, group_size = latent
    values = weight.float()
    if A is not None and B is not None:
        update = B[:, :1] * A[:1]
        for row in range(1, A.shape[0]):
            update += B[:, row : row + 1] * A[row : row + 1]
        values = values + scaling * update
    group = torch.arange(weight.shape[1], device=weight.device) // group_size
    return (values - offsets.float()[:, group]) / scales.float()[:, group]


@reference.implements("latent_codes")
def latent_codes(latent: Latent) -> list[Tensor]:
    """Round the latent weight to codes and pack them."""
    codes = _steps(latent).round_().clamp_(0, (1 << latent.bits) - 1).to(torch.uint8)
    return pack_codes(codes, latent.bits)


@reference.implements("latent_grads")
def latent_grads(product: Tensor, latent: Latent) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dW = product within the grid's range, and du and dv from its group sums."""
    rounded, group_size = _steps(latent).round_(), latent.group_size
    codes = rounded.clamp(0, (1 << latent.bits) - 1)
    short = -product.shape[1] % group_size

    def group_sums(values: Tensor) -> Tensor:
        padded: Tensor = torch.nn.functional.pad(values, (0, short))
        sums: Tensor = padded.unflatten(-1, (-1, group_size)).sum(-1)
        return sums

    grad_u = group_sums(product * codes) * latent.scales
    grad_v = group_sums(product) * latent.scales
    return product * (codes == rounded), grad_u, grad_v
