"""The Triton backend's products of a low rank: cuBLAS, in as few launches as it takes.

The host launches kernels slower than a GPU computes these, so a cast or a sum of its own costs as
much as the product before it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from graft.kernels.backend.triton_launch import as_matrix, triton
from graft.kernels.frozen.triton import grad_input, linear
from graft.kernels.low_rank import reference
from graft.kernels.low_rank.casts import Casts
from graft.kernels.packed.weight import Weight

casts = Casts()
"""Of A and B; what runs without this module, as a recorded graph does, refreshes them before."""

Product = Callable[[Tensor, Weight], Tensor]

_HALVES = (torch.bfloat16, torch.float16)


def _with_update(
    product: Product, x: Tensor, weight: Weight, down: Tensor, up: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Compute the frozen product + hidden up; hidden = scaling x down is rounded once."""
    matrix = as_matrix(x)
    hidden = torch.addmm(matrix.new_empty(1), matrix, down, beta=0, alpha=scaling)
    out = product(x, weight)
    # In place, which autocast leaves alone: the dtype is the product's, whatever that is.
    out.view(-1, out.shape[-1]).addmm_(hidden.to(out.dtype), up.to(out.dtype))
    return out, hidden.view(*x.shape[:-1], hidden.shape[-1])


@triton.implements("lora_linear")
def lora_linear(
    x: Tensor, weight: Weight, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Compute y = x Wᵀ + hidden Bᵀ and hidden = scaling x Aᵀ."""
    down, up = casts.of(A, x.dtype).T, casts.of(B, x.dtype).T
    return _with_update(linear, x, weight, down, up, scaling)


@triton.implements("lora_grad_input")
def lora_grad_input(
    grad: Tensor, weight: Weight, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Compute dx = dy W + hidden A and hidden = scaling dy B."""
    down, up = casts.of(B, grad.dtype), casts.of(A, grad.dtype)
    return _with_update(grad_input, grad, weight, down, up, scaling)


@triton.implements("token_product")
def token_product(a: Tensor, b: Tensor) -> Tensor:
    """Compute aᵀ b over all tokens, float32, without rounding the sums to a's dtype."""
    if a.dtype not in _HALVES or a.dtype != b.dtype or not a.numel():
        return reference.token_product(a, b)
    return _float32_product(as_matrix(a).T, as_matrix(b))


def _float32_product(a: Tensor, b: Tensor) -> Tensor:
    # Without a GPU the interpreter's tests come here, and PyTorch has no such product.
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()
