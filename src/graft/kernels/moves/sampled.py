"""The gradient of a grid's scales from some of the tokens, unbiased."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.kernels.frozen.ops import int_group_grad_offsets, int_group_grad_statistics
from graft.kernels.low_rank.ops import token_product
from graft.kernels.packed.weight import Weight


def sampled_grad_statistics(
    grad: Tensor, x: Tensor, weight: Weight, means: Tensor, points: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `int_group_grad_statistics`, d offsets exact and d scales an unbiased estimate.

    d scales, the group sums of q * (dyᵀ x), takes a product as large as the forward pass. Here only
    what is cheap is exact, and the rest is of the tokens that are drawn:

    - q is c = (2^bits - 1) / 2 and what is left; c's part is c times d offsets.
    - x is its mean over each row of tokens and what is left; the means' part is that of one token
      for each row: dyᵀ x = (Eᵀ dy)ᵀ (Eᵀ x) + dyᵀ (x - E Eᵀ x), E = means.
    - Of what is left, token t is drawn with a chance in proportion to |dy_t| |x_t|, by which it is
      divided, which makes the error smaller than equal chances do by half.

    means: [tokens, rows], 1/sqrt(length) where a token is of a row; points: float64 [n, 4], each
    the flat begin and end of its row, a place in [0, 1) of the row's sum of |dy| |x|, and
    1 / (points of the row). The places of a row are evenly spaced from a random first one.
    """
    layout = weight.layout
    d_offsets = int_group_grad_offsets(grad, x, layout.group_size)
    grad, x = grad.flatten(0, -2), x.flatten(0, -2)
    tokens, factors = _drawn(grad, x, points)
    mean_grad, mean_x = token_product(means, grad), token_product(means, x)
    some_grad = grad[tokens] * factors[:, None].to(grad.dtype)
    some_x = x[tokens] - (means[tokens].float() @ mean_x).to(x.dtype)
    both = torch.cat((some_grad, mean_grad.to(x.dtype))), torch.cat((some_x, mean_x.to(x.dtype)))
    coded, plain = int_group_grad_statistics(*both, weight, None)
    middle = (2**layout.bits - 1) / 2
    return coded.sub_(plain, alpha=middle).add_(d_offsets, alpha=middle), d_offsets


def _drawn(grad: Tensor, x: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens at the points, int64 [n], and the inverse of how often each is expected."""
    sizes = (torch.linalg.vector_norm(one, dim=-1, dtype=torch.float32) for one in (grad, x))
    chances = next(sizes).double() * next(sizes).double()
    sums = torch.cat((chances.new_zeros(1), chances.cumsum(0)))
    begin, end, place, share = points.unbind(1)
    low, high = sums[begin.long()], sums[end.long()]
    tokens = torch.searchsorted(sums[1:], low + place * (high - low), right=True)
    tokens = torch.minimum(tokens, end.long() - 1)
    chance = chances[tokens]
    # A row without any gradient: 0 instead of 0 / 0.
    factors = torch.where(chance > 0, (high - low) * share / chance, 0.0)
    return tokens, factors
