"""The latent weight's operations by the native kernels (csrc/latent.inc)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from graft.kernels.backend.native_library import (
    COMPUTE,
    DTYPES,
    address,
    call,
    native,
    plane_addresses,
)
from graft.kernels.latent import reference
from graft.kernels.packed.planes import empty_planes
from graft.kernels.packed.weight import Latent


class LatentWeight(ctypes.Structure):
    """graft_latent."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "cols", "bits", "group_size")),
        *((name, ctypes.c_int64) for name in ("weight_dtype", "dtype")),
        *((name, ctypes.c_void_p) for name in ("weight", "scales", "offsets")),
        ("rank", ctypes.c_int64),
        ("scaling", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("down", "up")),
    ]


def _struct(latent: Latent) -> tuple[LatentWeight, list[Tensor | None]]:
    """Return the C struct, and what must stay alive while it is used."""
    tensors = [None if tensor is None else tensor.contiguous() for tensor in latent[:5]]
    addresses = [address(tensor) for tensor in tensors]
    dtypes = DTYPES[latent.weight.dtype], DTYPES[latent.scales.dtype]
    rank = 0 if latent.A is None else latent.A.shape[0]
    sizes = (*latent.weight.shape, latent.bits, latent.group_size, *dtypes)
    return LatentWeight(*sizes, *addresses[:3], rank, latent.scaling, *addresses[3:]), tensors


def _computes(latent: Latent) -> bool:
    stored = latent.scales.dtype in (torch.float16, torch.float32)
    update = latent.A is None or latent.A.dtype == torch.float32
    return latent.weight.dtype in COMPUTE and stored and update


@native.implements("latent_codes")
def latent_codes(latent: Latent) -> list[Tensor]:
    """Round the latent weight to packed codes, row by row."""
    if not _computes(latent):
        return reference.latent_codes(latent)
    planes = empty_planes(latent.weight, latent.bits)
    struct, alive = _struct(latent)
    call("latent_codes", ctypes.byref(struct), *plane_addresses(planes))
    del alive
    return planes


@native.implements("latent_grads")
def latent_grads(product: Tensor, latent: Latent) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dW, du and dv in one pass over the product and the weight."""
    if not _computes(latent) or product.dtype != torch.float32:
        return reference.latent_grads(product, latent)
    struct, alive = _struct(latent)
    whole = product.contiguous()
    grad = torch.empty_like(whole)
    grad_u, grad_v = (torch.empty_like(latent.scales, dtype=torch.float32) for _ in range(2))
    outputs = [address(tensor) for tensor in (whole, grad, grad_u, grad_v)]
    call("latent_grads", ctypes.byref(struct), *outputs)
    del alive
    return grad, grad_u, grad_v
