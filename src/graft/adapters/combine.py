"""Combining the updates of several adapters into one: sums, TIES and DARE, on any tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from graft.adapters.low_rank import LowRank, Spectrum, spectrum, spectrum_of_product
from graft.errors import GraftError

Combination = Callable[[Sequence[Tensor], Sequence[float], float, torch.Generator], Tensor]
"""From tensors of one shape, their weights, a density and randomness to one tensor, float64."""


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return Σ w T, float64."""
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total += weight * tensor.double()
    return total


def trimmed(tensor: Tensor, density: float) -> Tensor:
    """Return a tensor with all but the int(density · elements) largest of its elements 0."""
    kept = int(density * tensor.numel())
    flat = tensor.flatten()
    places = flat.abs().topk(kept).indices
    return torch.zeros_like(flat).index_copy(0, places, flat[places]).view_as(tensor)


def dropped(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Return a tensor with each element kept with probability `density`, and divided by it."""
    # Drawn in float32, as PEFT draws it.
    chance = torch.full(tensor.shape, density, dtype=torch.float32)
    return tensor * torch.bernoulli(chance, generator=generator) / density


def elected(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return for each element the mean of w T over those T that have the sign of Σ T.

    A sum of 0 counts as positive, and an element that is 0 in all is 0.
    """
    sign = torch.where(weighted_sum(tensors, [1.0] * len(tensors)) >= 0, 1.0, -1.0)
    total = torch.zeros_like(sign, dtype=torch.float64)
    count = torch.zeros_like(total)
    for tensor, weight in zip(tensors, weights, strict=True):
        agrees = tensor.sign() == sign
        total += weight * tensor.double() * agrees
        count += agrees
    return total / count.clamp_min(1)


def _sum(
    tensors: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator
) -> Tensor:
    return weighted_sum(tensors, weights)


def ties(
    tensors: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator
) -> Tensor:
    """Return TIES: trim each, elect a sign, take the mean of those that agree (arXiv 2306.01708).

    The weights multiply after the election, as in PEFT.
    """
    return elected([trimmed(tensor, density) for tensor in tensors], weights)


def dare(
    tensors: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator
) -> Tensor:
    """Return DARE: drop elements at random, rescale the rest, take the sum (arXiv 2311.03099)."""
    return weighted_sum([dropped(tensor, density, generator) for tensor in tensors], weights)


def dare_ties(
    tensors: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator
) -> Tensor:
    """Return TIES with DARE's random dropping in the place of trimming."""
    return elected([dropped(tensor, density, generator) for tensor in tensors], weights)


COMBINATIONS: dict[str, Combination] = {
    "linear": _sum,
    "svd": _sum,
    "ties": ties,
    "dare": dare,
    "dare_ties": dare_ties,
}
EXACT = ("linear", "svd")
"""Combinations whose result is a low-rank update itself, without a decomposition."""
MEANS = ("ties",)
"""Combinations that take a mean themselves, so that weights of 1 keep an update's size."""
DENSE = tuple(name for name in COMBINATIONS if name not in EXACT)
"""Those that take a density."""


def stacked(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Return Σ w B A exactly, of the sum of their ranks: the factors side by side."""
    shares = [_shares(weight) for weight in weights]
    return LowRank(
        torch.cat([one.A.double() * a for one, (a, _) in zip(updates, shares, strict=True)]),
        torch.cat([one.B.double() * b for one, (_, b) in zip(updates, shares, strict=True)], 1),
    )


def combined_factors(
    how: str,
    updates: Sequence[LowRank],
    weights: Sequence[float],
    density: float,
    generator: torch.Generator,
) -> LowRank:
    """Return the combination of the A's and that of the B's: PEFT's linear, ties and dare_linear.

    √|w| multiplies both, its sign the A's. The product of the two is not the combination of the
    products: it holds products of one adapter's B with another's A. Raises GraftError for
    different ranks.
    """
    ranks = sorted({len(one.A) for one in updates})
    if len(ranks) > 1:
        raise GraftError(f"factors of ranks {ranks} cannot be added; combine the updates instead")
    combine, shares = COMBINATIONS[how], [_shares(weight) for weight in weights]
    return LowRank(
        combine([one.A.double() for one in updates], [a for a, _ in shares], density, generator),
        combine([one.B.double() for one in updates], [b for _, b in shares], density, generator),
    )


def combined_spectrum(
    how: str,
    updates: Sequence[LowRank],
    weights: Sequence[float],
    density: float,
    generator: torch.Generator,
) -> Spectrum:
    """Return the singular values of the combination of the updates B A themselves."""
    if how in EXACT:
        return spectrum_of_product(stacked(updates, weights))
    dense = [one.B.double() @ one.A.double() for one in updates]
    return spectrum(COMBINATIONS[how](dense, weights, density, generator))


def _shares(weight: float) -> tuple[float, float]:
    """Return what multiplies A and B for a weight."""
    root = float(abs(weight) ** 0.5)
    return (root if weight >= 0 else -root), root
