"""Low-rank updates by the native kernels: in the same pass over the weight."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from graft.kernels.backend.native_library import (
    COMPUTE,
    DTYPES,
    LowRank,
    address,
    call,
    native,
    prepared,
)
from graft.kernels.frozen.native import check_width, grad_input, linear, reads, token_count
from graft.kernels.low_rank import reference
from graft.kernels.packed.weight import Weight

_NARROW = 128
"""The columns of a product over tokens that are too few for the threads."""


def _low_rank_product(
    name: str, x: Tensor, weight: Weight, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    layout, is_forward = weight.layout, name == "linear"
    features, columns = layout.in_features, layout.out_features
    if not is_forward:
        features, columns = columns, features
    check_width(x, features)
    matrix = x.contiguous()
    down, up = A.to(x.dtype).contiguous(), B.to(x.dtype).contiguous()
    out = x.new_empty((*x.shape[:-1], columns))
    hidden = x.new_empty((*x.shape[:-1], A.shape[0]))
    if not x.numel():
        return out, hidden
    low_rank = LowRank(A.shape[0], scaling, address(down), address(up))
    where = prepared(weight).reference, ctypes.byref(low_rank)
    sizes = DTYPES[x.dtype], address(matrix), token_count(x)
    call(name, *where, *sizes, address(out), address(hidden))
    return out, hidden


@native.implements("lora_linear")
def lora_linear(
    x: Tensor, weight: Weight, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Compute y = x Wᵀ + hidden Bᵀ and hidden = scaling x Aᵀ in one pass over W."""
    if not reads(x, weight):
        return reference.updated_output(linear(x, weight), x, A, B, scaling)
    return _low_rank_product("linear", x, weight, A, B, scaling)


@native.implements("lora_grad_input")
def lora_grad_input(
    grad: Tensor, weight: Weight, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Compute dx = dy W + hidden A and hidden = scaling dy B in one pass over W."""
    if not reads(grad, weight):
        return reference.updated_gradient(grad_input(grad, weight), grad, A, B, scaling)
    return _low_rank_product("grad_input", grad, weight, A, B, scaling)


@native.implements("token_product")
def token_product(a: Tensor, b: Tensor) -> Tensor:
    """Compute aᵀ b over all tokens, float32."""
    if a.dtype not in COMPUTE or b.dtype != a.dtype:
        return reference.token_product(a, b)
    rows, columns = a.shape[-1], b.shape[-1]
    if columns <= _NARROW < rows:
        # The columns are what is shared out to the threads.
        return token_product(b, a).T.contiguous()
    left, right = a.contiguous(), b.contiguous()
    if not a.numel():
        return a.new_zeros((rows, columns), dtype=torch.float32)
    out = a.new_empty((rows, columns), dtype=torch.float32)
    sizes = address(left), rows, address(right), columns, token_count(a)
    call("token_product", DTYPES[a.dtype], *sizes, address(out))
    return out


@native.implements("pool")
def pool(x: Tensor, group_size: int) -> Tensor:
    """Compute the sums over groups of neighbouring features, in float32, rounded to x's dtype."""
    if x.dtype not in COMPUTE:
        return reference.pool(x, group_size)
    matrix = x.contiguous()
    out = x.new_empty((*x.shape[:-1], -(-x.shape[-1] // group_size)))
    sizes = token_count(x), x.shape[-1], group_size
    call("pool", DTYPES[x.dtype], address(matrix), *sizes, address(out))
    return out


@native.implements("int_group_grad_offsets")
def int_group_grad_offsets(grad: Tensor, x: Tensor, group_size: int) -> Tensor:
    """Compute d offset[o, g] = sum over tokens of dy[o] * groupsum(x)[g]; float32."""
    return token_product(grad.float(), pool(x.float(), group_size))
