"""The latent weight's operations by the native kernels (csrc/latent.inc)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from graft.kernels import reference_latent as reference
from graft.kernels.native import native
from graft.kernels.native_library import COMPUTE, DTYPES, address, call
from graft.kernels.packing import PLANES, plane_bytes


class Latent(ctypes.Structure):
    """graft_latent."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "cols", "bits", "group_size")),
        *((name, ctypes.c_int64) for name in ("weight_dtype", "dtype")),
        *((name, ctypes.c_void_p) for name in ("weight", "scales", "offsets")),
        ("rank", ctypes.c_int64),
        ("scaling", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("down", "up")),
    ]


def _latent(
    weight: Tensor,
    scales: Tensor,
    offsets: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    scaling: float,
    bits: int,
    group_size: int,
) -> tuple[Latent, list[Tensor | None]]:
    """Return the C struct, and what must stay alive while it is used."""
    tensors = [None if t is None else t.contiguous() for t in (weight, scales, offsets, A, B)]
    addresses = [address(tensor) for tensor in tensors]
    dtypes = DTYPES[weight.dtype], DTYPES[scales.dtype]
    rank = 0 if A is None else A.shape[0]
    sizes = (*weight.shape, bits, group_size, *dtypes)
    return Latent(*sizes, *addresses[:3], rank, scaling, *addresses[3:]), tensors


def _computes(weight: Tensor, scales: Tensor, A: Tensor | None) -> bool:
    known = weight.dtype in COMPUTE and scales.dtype in (torch.float16, torch.float32)
    return known and (A is None or A.dtype == torch.float32)


@native.implements("latent_codes")
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
    """Round the latent weight to packed codes, row by row."""
    arguments = weight, scales, offsets, A, B, scaling, bits, group_size
    if not _computes(weight, scales, A):
        return reference.latent_codes(*arguments)
    rows, columns = weight.shape
    planes = [
        weight.new_empty((rows, plane_bytes(plane, columns)), dtype=torch.uint8)
        for plane in PLANES[bits]
    ]
    high = planes[1] if len(planes) > 1 else None
    struct, alive = _latent(*arguments)
    call("latent_codes", ctypes.byref(struct), address(planes[0]), address(high))
    del alive
    return planes[0], high


@native.implements("latent_grads")
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
    """Compute dW, du and dv in one pass over the product and the weight."""
    arguments = weight, scales, offsets, A, B, scaling, bits, group_size
    if not _computes(weight, scales, A) or product.dtype != torch.float32:
        return reference.latent_grads(product, *arguments)
    struct, alive = _latent(*arguments)
    whole = product.contiguous()
    grad = torch.empty_like(whole)
    grad_u, grad_v = (torch.empty_like(scales, dtype=torch.float32) for _ in range(2))
    outputs = [address(tensor) for tensor in (whole, grad, grad_u, grad_v)]
    call("latent_grads", ctypes.byref(struct), *outputs)
    del alive
    return grad, grad_u, grad_v
