"""Combinations of updates against loops over their elements, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from graft.adapters.combine import (
    COMBINATIONS,
    combined_factors,
    combined_spectrum,
    dare,
    dare_ties,
    stacked,
    ties,
    weighted_sum,
)
from graft.adapters.low_rank import LowRank
from graft.errors import GraftError

WEIGHTS = [0.7, -0.4, 1.3]


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def elements(tensors: list[Tensor]) -> list[list[float]]:
    return [tensor.flatten().tolist() for tensor in tensors]


def elect(columns: list[list[float]]) -> list[float]:
    """TIES from the election on, an element at a time."""
    merged = []
    for values in zip(*columns, strict=True):
        sign = 1 if math.fsum(values) >= 0 else -1
        agreeing = [w * v for w, v in zip(WEIGHTS, values, strict=True) if v * sign > 0]
        merged.append(math.fsum(agreeing) / max(len(agreeing), 1))
    return merged


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_equals_a_loop(density: float) -> None:
    tensors = [torch.randn(9, 14, dtype=torch.float64) for _ in WEIGHTS]
    columns = []
    for values in elements(tensors):
        kept = sorted(values, key=abs)[len(values) - int(density * len(values)) :]
        columns.append([value if value in kept else 0.0 for value in values])
    found = ties(tensors, WEIGHTS, density, random())
    torch.testing.assert_close(found.flatten().tolist(), elect(columns), rtol=0, atol=1e-15)


def test_dare_equals_a_loop_on_the_same_draws() -> None:
    tensors = [torch.randn(9, 14, dtype=torch.float64) for _ in WEIGHTS]
    draws = random(3)
    masks = [torch.bernoulli(torch.full((9, 14), 0.3), generator=draws) for _ in WEIGHTS]
    kept = [
        [value / 0.3 if keep else 0.0 for value, keep in zip(values, mask, strict=True)]
        for values, mask in zip(elements(tensors), elements(masks), strict=True)
    ]
    summed = [
        math.fsum(w * v for w, v in zip(WEIGHTS, values, strict=True))
        for values in zip(*kept, strict=True)
    ]
    found = dare(tensors, WEIGHTS, 0.3, random(3)).flatten().tolist()
    torch.testing.assert_close(found, summed, rtol=1e-14, atol=1e-15)
    found = dare_ties(tensors, WEIGHTS, 0.3, random(3)).flatten().tolist()
    torch.testing.assert_close(found, elect(kept), rtol=1e-14, atol=1e-15)
    assert not torch.equal(
        dare(tensors, WEIGHTS, 0.3, random(4)), dare(tensors, WEIGHTS, 0.3, random(3))
    )


def test_dare_leaves_the_mean_where_it_was() -> None:
    tensor = torch.ones(200, 200, dtype=torch.float64)
    found = dare([tensor], [1.0], 0.25, random())
    assert set(found.unique().tolist()) == {0.0, 4.0}
    assert found.mean().item() == pytest.approx(1, abs=0.05)


def adapters(ranks: tuple[int, ...]) -> list[LowRank]:
    return [LowRank(torch.randn(rank, 14), torch.randn(9, rank)) for rank in ranks]


def test_the_weighted_sum_of_updates_is_exact_in_the_sum_of_their_ranks() -> None:
    updates = adapters((2, 3, 4))
    expected = weighted_sum([one.B.double() @ one.A.double() for one in updates], WEIGHTS)
    A, B = stacked(updates, WEIGHTS)
    assert len(A) == 9
    torch.testing.assert_close(B @ A, expected, rtol=0, atol=1e-13)
    found = combined_spectrum("svd", updates, WEIGHTS, 1.0, random())
    torch.testing.assert_close(found.S, torch.linalg.svdvals(expected)[: found.rank])


@pytest.mark.parametrize("how", COMBINATIONS)
def test_updates_are_combined_before_they_are_taken_apart(how: str) -> None:
    updates = adapters((2, 3, 4))
    dense = [one.B.double() @ one.A.double() for one in updates]
    expected = COMBINATIONS[how](dense, WEIGHTS, 0.5, random())
    A, B = combined_spectrum(how, updates, WEIGHTS, 0.5, random()).cut()
    torch.testing.assert_close(B @ A, expected, rtol=0, atol=1e-11)


def test_factors_are_combined_one_by_one_and_only_of_one_rank() -> None:
    updates = adapters((3, 3, 3))
    A, B = combined_factors("linear", updates, WEIGHTS, 1.0, random())
    signs = [1.0, -1.0, 1.0]
    roots = [math.sqrt(abs(weight)) for weight in WEIGHTS]
    expected = sum(s * r * one.A.double() for s, r, one in zip(signs, roots, updates, strict=True))
    torch.testing.assert_close(A, expected)
    torch.testing.assert_close(
        B, sum(r * one.B.double() for r, one in zip(roots, updates, strict=True))
    )
    with pytest.raises(GraftError, match=r"ranks \[2, 3\] cannot be added"):
        combined_factors("linear", adapters((2, 3)), [1.0, 1.0], 1.0, random())
