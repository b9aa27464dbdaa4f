"""Low-rank factors against their float64 truth: the truncated singular values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graft.calibrate.hessian import damped_hessian
from graft.calibrate.low_rank import rank_for_ratio, spectrum
from graft.errors import GraftError

SHAPES = [(24, 40), (40, 24), (32, 32)]


def weight_and_inputs(out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    mix = torch.randn(in_features, in_features, dtype=torch.float64)
    x = (
        torch.randn(200, in_features, dtype=torch.float64)
        @ mix
        * torch.logspace(-2, 1, in_features)
    )
    return torch.randn(out_features, in_features, dtype=torch.float64), x.T @ x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 7, 24])
def test_the_plain_error_is_the_tail_of_the_singular_values(shape, rank) -> None:
    weight, _ = weight_and_inputs(*shape)
    found = spectrum(weight)
    truth = torch.linalg.svdvals(weight)
    torch.testing.assert_close(found.values, truth, rtol=1e-9, atol=1e-9)
    down, up = found.factors(rank)
    assert (down.shape, up.shape) == ((rank, shape[1]), (shape[0], rank))
    error = (weight - up @ down).square().sum()
    torch.testing.assert_close(error, truth[rank:].square().sum(), rtol=1e-9, atol=1e-9)
    assert found.lost(rank) == pytest.approx(error.item(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 7, 24])
def test_the_error_of_the_outputs_is_the_tail_of_the_whitened_values(shape, rank) -> None:
    weight, inputs = weight_and_inputs(*shape)
    damped = damped_hessian(inputs, 0.01)
    root = torch.linalg.cholesky(damped)
    truth = torch.linalg.svdvals(weight @ root)
    found = spectrum(weight, inputs, 0.01)
    torch.testing.assert_close(found.values, truth, rtol=1e-7, atol=1e-9 * truth[0].item())
    down, up = found.factors(rank)
    lost = weight - up @ down
    error = ((lost @ damped) * lost).sum()
    expected = truth[rank:].square().sum()
    torch.testing.assert_close(error, expected, rtol=1e-7, atol=1e-12 * truth[0].item() ** 2)
    plain_down, plain_up = spectrum(weight).factors(rank)
    plain = weight - plain_up @ plain_down
    if rank < min(shape):
        assert error < ((plain @ damped) * plain).sum()


def test_the_factors_of_svd_llm_are_these() -> None:
    """U_r U_rᵀ W is U_r S_r V_rᵀ L⁻¹, the form in which the article has it."""
    weight, inputs = weight_and_inputs(24, 40)
    root = torch.linalg.cholesky(damped_hessian(inputs, 0.01))
    left, sizes, right = torch.linalg.svd(weight @ root, full_matrices=False)
    published = (
        left[:, :9]
        * sizes[:9]
        @ torch.linalg.solve_triangular(root, right[:9], upper=False, left=False)
    )
    down, up = spectrum(weight, inputs, 0.01).factors(9)
    torch.testing.assert_close(up @ down, published, rtol=1e-7, atol=1e-9)


def test_both_factors_of_a_rank_are_as_long() -> None:
    down, up = spectrum(weight_and_inputs(24, 40)[0]).factors(9)
    torch.testing.assert_close(down.norm(dim=1), up.norm(dim=0))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_of_low_rank_comes_back_and_zeros_do_no_harm(shape) -> None:
    thin = torch.randn(shape[0], 3) @ torch.randn(3, shape[1])
    down, up = spectrum(thin).factors(3)
    torch.testing.assert_close(up @ down, thin.double(), rtol=0, atol=1e-6)
    wide = spectrum(thin).factors(min(shape))
    torch.testing.assert_close(wide[1] @ wide[0], thin.double(), rtol=0, atol=1e-6)
    empty = spectrum(torch.zeros(shape))
    assert empty.rank_for(0.9) == 1 and not torch.cat([f.flatten() for f in empty.factors(2)]).any()


def test_the_rank_for_an_energy_is_the_smallest() -> None:
    weight = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0]))  # squares 16, 9, 4, 1 of 30
    found = spectrum(weight)
    ranks = {0.1: 1, 16 / 30: 1, 0.54: 2, 25 / 30: 2, 0.9: 3, 0.99: 4, 1.0: 4}
    assert {energy: found.rank_for(energy) for energy in ranks} == ranks


def test_the_rank_for_a_ratio_never_exceeds_it() -> None:
    for ratio in (0.1, 0.5, 0.9):
        rank = rank_for_ratio(ratio, 48, 96)
        assert rank * (48 + 96) <= ratio * 48 * 96 < (rank + 1) * (48 + 96)
    assert rank_for_ratio(1e-6, 48, 96) == 1


def test_inputs_that_are_not_finite_are_refused() -> None:
    weight, inputs = weight_and_inputs(24, 40)
    with pytest.raises(GraftError, match="not positive definite or not finite"):
        spectrum(weight, inputs * torch.nan)
