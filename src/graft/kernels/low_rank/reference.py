"""Low-rank updates in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from graft.kernels.backend.reference import reference
from graft.kernels.frozen import reference as frozen
from graft.kernels.packed.weight import Weight


@reference.implements("lora_linear")
def lora_linear(
    x: Tensor, weight: Weight, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Compute y = x Wᵀ + hidden Bᵀ and hidden = scaling x Aᵀ."""
    return updated_output(frozen.linear(x, weight), x, A, B, scaling)


@reference.implements("lora_grad_input")
def lora_grad_input(
    grad: Tensor, weight: Weight, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Compute dx = dy W + hidden A and hidden = scaling dy B."""
    return updated_gradient(frozen.grad_input(grad, weight), grad, A, B, scaling)


def updated_output(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return the outputs of `lora_linear` from y = x Wᵀ, whoever computed that."""
    hidden = functional.linear(x, A.to(x.dtype)) * scaling
    return y + functional.linear(hidden, B.to(x.dtype)), hidden


def updated_gradient(
    dx: Tensor, grad: Tensor, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return the outputs of `lora_grad_input` from dx = dy W, whoever computed that."""
    hidden = (grad @ B.to(grad.dtype)) * scaling
    return dx + hidden @ A.to(grad.dtype), hidden


def hidden_and_gradient(
    grad: Tensor, inputs: Tensor, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return hidden = scaling inputs Aᵀ and its gradient, scaling dy B; of them come dB and dA."""
    hidden = (inputs @ A.T.to(inputs.dtype)) * scaling
    return hidden, (grad @ B.to(grad.dtype)) * scaling


@reference.implements("token_product")
def token_product(a: Tensor, b: Tensor) -> Tensor:
    """Compute aᵀ b over all tokens, float32."""
    return (a.reshape(-1, a.shape[-1]).T @ b.reshape(-1, b.shape[-1])).float()


@reference.implements("pool")
def pool(x: Tensor, group_size: int) -> Tensor:
    """Compute the sums over groups of neighbouring features, in float32, rounded to x's dtype."""
    short = -x.shape[-1] % group_size
    groups = functional.pad(x, (0, short)).unflatten(-1, (-1, group_size))
    pooled: Tensor = groups.sum(-1, dtype=torch.float32)
    return pooled.to(x.dtype)
