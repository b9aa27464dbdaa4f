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
from graft.kernels.packed.weight import Weight

Product = Callable[[Tensor, Weight], Tensor]

_HALVES = (torch.bfloat16, torch.float16)


def _with_update(
    product: Product, x: Tensor, weight: Weight, down: Tensor, up: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Compute the frozen product + hidden up; hidden = scaling x down is rounded once."""
    matrix = as_matrix(x)
    hidden = torch.addmm(matrix.new_empty(1), matrix, down.to(x.dtype), beta=0, alpha=scaling)
    out = product(x, weight)
    # In place, which autocast leaves alone: the dtype is the product's, whatever that is.
    out.view(-1, out.shape[-1]).addmm_(hidden.to(out.dtype), up.to(out.dtype))
    return out, hidden.view(*x.shape[:-1], hidden.shape[-1])


@triton.implements("lora_linear")
def lora_linear(
    x: Tensor, weight: Weight, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Compute y = x Wᵀ + hidden Bᵀ and hidden = scaling x Aᵀ."""
    return _with_update(linear, x, weight, A.T, B.T, scaling)


@triton.implements("lora_grad_input")
def lora_grad_input(
    grad: Tensor, weight: Weight, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Compute dx = dy W + hidden A and hidden = scaling dy B."""
    return _with_update(grad_input, grad, weight, B, A, scaling)


@triton.implements("token_product")
def token_product(a: Tensor, b: Tensor) -> Tensor:
    """Compute aᵀ b over all tokens, float32, without rounding the sums to a's dtype."""
    if a.dtype not in _HALVES or a.dtype != b.dtype or not a.is_cuda or not a.numel():
        return reference.token_product(a, b)
    return torch.mm(as_matrix(a).T, as_matrix(b), out_dtype=torch.float32)
