"""The operations of weights without groups: dense ones, and int8 with one scale per output row.

As in `graft.kernels.frozen.ops`, x is [..., in_features], grad [..., out_features], and x alone is
differentiable.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

import graft.kernels.backends  # noqa: F401  (registers them)
from graft.kernels.backend.operation import Operation
from graft.kernels.backend.registry import implementation

# dense: the weight itself, frozen ----------------------------------------------------------------


@Operation
def dense_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return y = x Wᵀ for a frozen weight of x's dtype; differentiable in x."""
    out: Tensor = implementation("dense_linear", x.device)(x, weight)
    return out


@dense_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@Operation
def dense_grad_input(grad: Tensor, weight: Tensor) -> Tensor:
    """Return dx = dy W."""
    out: Tensor = implementation("dense_grad_input", grad.device)(grad, weight)
    return out


@dense_grad_input.register_fake
def _(grad: Tensor, weight: Tensor) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], weight.shape[1]))


def _dense_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _dense_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return dense_grad_input(grad.contiguous(), *ctx.saved_tensors), None


dense_linear.register_autograd(_dense_backward, setup_context=_dense_save)

# int8: w = scale[row] * code ---------------------------------------------------------------------


@Operation
def int8_linear(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Return y = x Wᵀ with codes int8 [out, in] and scales float32 [out]; differentiable in x."""
    out: Tensor = implementation("int8_linear", x.device)(x, codes, scales)
    return out


@int8_linear.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@Operation
def int8_grad_input(grad: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Return dx = dy W."""
    out: Tensor = implementation("int8_grad_input", grad.device)(grad, codes, scales)
    return out


@int8_grad_input.register_fake
def _(grad: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], codes.shape[1]))


def _int8_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _int8_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return int8_grad_input(grad.contiguous(), *ctx.saved_tensors), None, None


int8_linear.register_autograd(_int8_backward, setup_context=_int8_save)
