"""Rounded inputs in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from graft.kernels.backend.reference import reference
from graft.kernels.frozen.reference import linear
from graft.kernels.packed.weight import Weight

_BLOCK = 32


def _rounded(x: Tensor, by_block: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [..., runs, inputs of a run], d [..., runs, 1] and max |x| / 127, all float32."""
    columns = x.shape[-1]
    values = functional.pad(x.float(), (0, -columns % _BLOCK if by_block else 0))
    runs = values.unflatten(-1, (-1, _BLOCK if by_block else columns))
    most = runs.abs().amax(-1, keepdim=True)
    codes = (runs * torch.where(most == 0, 0.0, 127 / most)).round()
    step = most / 127
    return codes, step.half().float() if by_block else step, step


@reference.implements("rounded_inputs")
def rounded_inputs(x: Tensor, by_block: bool) -> Tensor:
    """Compute d q in float32 and round once to x's dtype."""
    codes, factors, _ = _rounded(x, by_block)
    out: Tensor = (codes * factors).flatten(-2)[..., : x.shape[-1]].to(x.dtype)
    return out


@reference.implements("rounded_linear")
def rounded_linear(x: Tensor, weight: Weight, by_block: bool) -> Tensor:
    """Compute r(x) Wᵀ with the dequantised weight, and what the blocks' own sums change."""
    codes, factors, step = _rounded(x, by_block)
    met = (codes * factors).flatten(-2)[..., : x.shape[-1]]
    y = linear(met, weight)
    if by_block and weight.layout.kind == "int_group":
        sums = codes.sum(-1, keepdim=True)
        more = ((step * sums).half().float() - factors * sums).squeeze(-1)
        in_group = weight.layout.group_size // _BLOCK
        more = functional.pad(more, (0, -more.shape[-1] % in_group)).unflatten(-1, (-1, in_group))
        y = y + more.sum(-1) @ weight.statistics[1].float().T
    return y.to(x.dtype)
