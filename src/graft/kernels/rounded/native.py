"""Rounded inputs by the native kernels (csrc/integer_products.inc)."""

from __future__ import annotations

from torch import Tensor

from graft.kernels.backend.native_library import (
    COMPUTE,
    DTYPES,
    address,
    call,
    native,
    prepared,
)
from graft.kernels.frozen.native import check_width, token_count
from graft.kernels.packed.weight import Weight
from graft.kernels.rounded import reference


@native.implements("rounded_inputs")
def rounded_inputs(x: Tensor, by_block: bool) -> Tensor:
    """Compute d q, rounded once to x's dtype."""
    if x.dtype not in COMPUTE:
        return reference.rounded_inputs(x, by_block)
    matrix = x.contiguous()
    out = matrix.new_empty(matrix.shape)
    if x.numel():
        sizes = token_count(x), x.shape[-1], int(by_block)
        call("rounded_inputs", DTYPES[x.dtype], address(matrix), *sizes, address(out))
    return out


@native.implements("rounded_linear")
def rounded_linear(x: Tensor, weight: Weight, by_block: bool) -> Tensor:
    """Compute r(x) Wᵀ in integers."""
    if x.dtype not in COMPUTE:
        return reference.rounded_linear(x, weight, by_block)
    check_width(x, weight.layout.in_features)
    matrix = x.contiguous()
    out = x.new_empty((*x.shape[:-1], weight.layout.out_features))
    if x.numel():
        inputs = DTYPES[x.dtype], address(matrix), token_count(x), int(by_block)
        call("rounded_linear", prepared(weight).reference, *inputs, address(out))
    return out
