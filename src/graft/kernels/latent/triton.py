"""The Triton backend's latent weight: rounded, and differentiated, in one pass over it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graft.kernels.backend.triton_launch import DTYPES, STATISTICS, as_stored, launch, tiles, triton
from graft.kernels.latent import reference
from graft.kernels.packed.planes import BLOCK, PLANES, empty_planes
from graft.kernels.packed.weight import Latent

_COLUMNS = 128
"""Of a tile of the gradients: the largest group."""


def _computes(latent: Latent) -> bool:
    stored = {latent.scales.dtype, latent.offsets.dtype} <= set(STATISTICS)
    update = latent.A is None or latent.A.dtype == torch.float32
    return latent.weight.dtype in DTYPES and stored and update


def _operands(latent: Latent) -> tuple[tuple[Tensor | None, ...], int, dict[str, Any]]:
    """Return the kernels' tensors, the rank, and the constants that both kernels take."""
    rank = 0 if latent.A is None else latent.A.shape[0]
    constants = {
        "BITS": latent.bits,
        "GROUP": latent.group_size,
        "UPDATE": rank > 0,
        "SCALING": latent.scaling,
    }
    return as_stored(*latent[:5]), rank, constants


@triton.implements("latent_codes")
def latent_codes(latent: Latent) -> list[Tensor]:
    """Round the latent weight to packed codes."""
    if not _computes(latent):
        return reference.latent_codes(latent)
    rows, columns = latent.weight.shape
    planes = empty_planes(latent.weight, latent.bits)
    tensors, rank, constants = _operands(latent)
    blocks = tiles(columns, BLOCK)
    sizes = rows, columns, latent.scales.shape[1], blocks, rank
    constants |= {"PLANE": PLANES[latent.bits][0], "ROWS": 4, "BLOCKS": 16}
    grid = tiles(rows, 4), tiles(blocks, 16)
    codes, high, *_ = (*planes, None)
    assert codes is not None
    launch("latent_codes", grid, codes, high, *tensors, *sizes, **constants)
    return planes


@triton.implements("latent_grads")
def latent_grads(product: Tensor, latent: Latent) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dW, du and dv in one pass over the product and the weight."""
    if not _computes(latent) or product.dtype != torch.float32:
        return reference.latent_grads(product, latent)
    whole = product.contiguous()
    grad = torch.empty_like(whole)
    shape = latent.scales.shape
    grad_u, grad_v = (product.new_empty(shape) for _ in range(2))
    tensors, rank, constants = _operands(latent)
    sizes = *whole.shape, shape[1], rank
    grid = tiles(whole.shape[0], 8), tiles(whole.shape[1], _COLUMNS)
    constants |= {"ROWS": 8, "COLUMNS": _COLUMNS}
    launch("latent_grads", grid, grad, grad_u, grad_v, whole, *tensors, *sizes, **constants)
    return grad, grad_u, grad_v
