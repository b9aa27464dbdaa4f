"""Inputs that are rounded to 8 bits, and their products with integer weights, for every backend.

r(x) = d q with q = round(x / step) and step = max |x| / 127: over a whole token (by_block False,
d = step), or over each block of 32 inputs (by_block True, d = step as float16), which are
llama.cpp's Q8 blocks. A number that is not finite makes its block, or its token, NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import graft.kernels.backends  # noqa: F401  (registers them)
from graft.kernels.backend.operation import Operation
from graft.kernels.backend.registry import implementation
from graft.kernels.packed.weight import Weight


@Operation
def rounded_inputs(x: Tensor, by_block: bool) -> Tensor:
    """Return r(x) in x's dtype; the gradient passes straight through (arXiv 1308.3432)."""
    out: Tensor = implementation("rounded_inputs", x.device)(x, by_block)
    return out


@rounded_inputs.register_fake
def _(x: Tensor, by_block: bool) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


rounded_inputs.register_autograd(_backward, setup_context=_save)


@Operation
def rounded_linear(x: Tensor, weight: Weight, by_block: bool) -> Tensor:
    """Return y = r(x) Wᵀ in x's dtype, for integers in rows or in groups of whole blocks.

    It is not differentiable.

    With codes c in groups g of scale s and offset m,
    y = sum over g of (m step sum(q) + s sum over units of d (q · c)), where a unit is a block, or
    the whole group where a token has one d. q · c is exact: int8 products (AVX-512 VNNI, or AVX2).
    """
    out: Tensor = implementation("rounded_linear", x.device)(x, weight, by_block)
    return out


@rounded_linear.register_fake
def _(x: Tensor, weight: Weight, by_block: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.layout.out_features))


def takes_gradients(x: Tensor, weight: Weight) -> bool:
    """Return whether a product with x would be differentiated."""
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, *weight.tensors)
    )
