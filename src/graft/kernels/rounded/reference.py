"""Rounded inputs in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from graft.kernels.backend.reference import reference
from graft.kernels.frozen.reference import linear
from graft.kernels.packed.weight import Weight

_BLOCK = 32


@reference.implements("rounded_inputs")
def rounded_inputs(x: Tensor, by_block: bool) -> Tensor:
    """Compute d q in float32 and round once to x's dtype."""
    columns = x.shape[-1]
    values = functional.pad(x.float(), (0, -columns % _BLOCK if by_block else 0))
    runs = values.unflatten(-1, (-1, _BLOCK if by_block else columns))
    step = runs.abs().amax(-1, keepdim=True) / 127
    codes = (runs * torch.where(step == 0, 0.0, 1 / step)).round()
    factors = step.half().float() if by_block else step
    out: Tensor = (codes * factors).flatten(-2)[..., :columns].to(x.dtype)
    return out


@reference.implements("rounded_linear")
def rounded_linear(x: Tensor, weight: Weight, by_block: bool) -> Tensor:
    """Compute r(x) Wᵀ with the dequantised weight."""
    return linear(rounded_inputs(x, by_block), weight)
