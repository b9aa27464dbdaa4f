"""Inputs that are rounded to 8 bits, and their products with integer weights, for every backend.

r(x) = d q with q = round(127 x / m) and m = max |x|, over a whole token (by_block False, and then
d = m / 127) or over each block of 32 inputs (by_block True, d = m / 127 as float16). A number that
is not finite makes its block, or its token, NaN.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

import graft.kernels.backends  # noqa: F401  (registers them)
from graft.kernels.backend.operation import Operation
from graft.kernels.backend.registry import implementation
from graft.kernels.frozen.ops import linear_backward, trained_statistics
from graft.kernels.packed.weight import Weight, save_weight


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

    With codes c in groups g of scale s and offset m,
    y = sum over g of (m t + sum over its blocks of s d (q · c)), where t is the sum of d q. In
    blocks t is summed of (max |x| / 127) sum(q), each rounded to float16, as in llama.cpp's Q8_1.
    q · c is exact. The gradient passes straight through the rounding: it is that of r(x) Wᵀ.
    """
    out: Tensor = implementation("rounded_linear", x.device)(x, weight, by_block)
    return out


@rounded_linear.register_fake
def _(x: Tensor, weight: Weight, by_block: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.layout.out_features))


def _save_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, by_block = inputs
    kept = any(trained_statistics(ctx, weight))
    save_weight(ctx, weight, rounded_inputs(x, by_block) if kept else None)


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *linear_backward(ctx, grad), None


rounded_linear.register_autograd(_product_backward, setup_context=_save_product)
