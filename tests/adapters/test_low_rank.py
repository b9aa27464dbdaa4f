"""Singular values of updates, against PyTorch's own decomposition in float64."""

from __future__ import annotations

import math

import pytest
import torch

from graft.adapters.low_rank import (
    LowRank,
    effective_rank,
    inner_product,
    left_of,
    rank_for,
    spectrum,
    spectrum_of_product,
    subspace_similarity,
)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)])
def test_all_singular_values_give_the_matrix_back(shape: tuple[int, int]) -> None:
    W = torch.randn(shape)
    found = spectrum(W)
    expected = torch.linalg.svdvals(W.double())
    torch.testing.assert_close(found.S, expected, rtol=1e-9, atol=0)
    A, B = found.cut()
    torch.testing.assert_close(B @ A, W.double(), rtol=0, atol=1e-12)
    assert A.shape == (12 if 12 in shape else 16, shape[1])


@pytest.mark.parametrize("shape", [(20, 31), (31, 20)])
def test_a_cut_is_the_nearest_matrix_of_its_rank(shape: tuple[int, int]) -> None:
    W = torch.randn(shape, dtype=torch.float64)
    values = torch.linalg.svdvals(W)
    found = spectrum(W)
    for rank in (1, 5, 19):
        A, B = found.cut(rank)
        lost = (W - B @ A).square().sum()
        torch.testing.assert_close(lost, values[rank:].square().sum(), rtol=1e-9, atol=0)
        error = float(lost.sqrt() / W.norm())
        assert left_of([found.S], [rank]) == pytest.approx(error, rel=1e-9)


def test_a_product_is_taken_apart_as_the_matrix_is() -> None:
    update = LowRank(torch.randn(5, 40), torch.randn(23, 5))
    of_factors, of_matrix = spectrum_of_product(update), spectrum(update.B @ update.A)
    torch.testing.assert_close(of_factors.S, of_matrix.S[:5], rtol=1e-6, atol=0)
    A, B = of_factors.cut(3)
    expected, other = of_matrix.cut(3)
    torch.testing.assert_close(B @ A, other @ expected, rtol=0, atol=1e-6)
    assert spectrum_of_product(LowRank(torch.randn(5, 40), torch.zeros(23, 5))).rank == 0


def test_what_is_not_there_has_no_rank() -> None:
    narrow = torch.randn(30, 4, dtype=torch.float64) @ torch.randn(4, 50, dtype=torch.float64)
    assert spectrum(narrow).rank == 4
    assert spectrum(torch.zeros(6, 9)).rank == 0
    assert spectrum(torch.zeros(6, 9)).cut(3).A.shape == (0, 9)
    assert spectrum(torch.zeros(6, 9)).rank_for(0.5) == 0


def test_the_rank_for_a_share_of_the_energy_equals_a_loop() -> None:
    values = torch.rand(40, dtype=torch.float64).sort(descending=True).values
    for energy in (0.0, 0.1, 0.5, 0.9, 0.99, 0.9999999):
        total, kept, rank = math.fsum(v * v for v in values.tolist()), 0.0, 0
        while kept < energy * total or rank == 0:
            kept += values[rank].item() ** 2
            rank += 1
        assert rank_for(values, energy) == rank
    assert rank_for(values, 1.0) == 40
    assert rank_for(torch.tensor([1.0, 1e-6]), 1.0) == 2


def test_figures_of_known_spectra() -> None:
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([3.0])) == pytest.approx(1)
    assert 1 < effective_rank(torch.tensor([3.0, 1.0])) < 2
    basis = torch.eye(9, dtype=torch.float64)
    assert subspace_similarity(basis[:, :3], basis[:, :5]) == pytest.approx(1)
    assert subspace_similarity(basis[:, :3], basis[:, 2:8]) == pytest.approx(1 / 3)
    one = LowRank(torch.randn(3, 8), torch.randn(6, 3))
    other = LowRank(torch.randn(4, 8), torch.randn(6, 4))
    expected = ((one.B @ one.A) * (other.B @ other.A)).sum().item()
    assert inner_product(one, other) == pytest.approx(expected, rel=1e-4)
