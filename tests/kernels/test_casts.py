"""Copies of trained factors in another dtype: right after every write, and made together."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from graft.kernels.low_rank.casts import Casts

HALF = torch.bfloat16


@pytest.fixture
def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(3, 4)) for _ in range(5)]


def assert_right(casts: Casts, parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        for tensor in (parameter, parameter.detach()):
            assert torch.equal(casts.of(tensor, HALF), parameter.to(HALF))
            assert not casts.of(tensor, HALF).requires_grad


def test_a_copy_follows_its_parameter(parameters: list[nn.Parameter]) -> None:
    casts, optimizer = Casts(), torch.optim.AdamW(parameters, lr=1.0, fused=True)
    for _ in range(3):
        assert_right(casts, parameters)
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    assert_right(casts, parameters)
    with torch.no_grad():
        parameters[2].copy_(torch.ones(3, 4))
    assert_right(casts, parameters)
    parameters[1].data = torch.zeros(3, 4)
    assert_right(casts, parameters)


def test_one_launch_copies_all_that_was_written(
    parameters: list[nn.Parameter], monkeypatch: pytest.MonkeyPatch
) -> None:
    casts, copied, copy = Casts(), [], torch._foreach_copy_

    def counted(to: list[Tensor], of: list[Tensor]) -> None:
        copied.append(len(of))
        copy(to, of)

    monkeypatch.setattr(torch, "_foreach_copy_", counted)
    assert_right(casts, parameters)
    copied.clear()
    with torch.no_grad():
        torch._foreach_mul_(parameters, 2.0)
    assert_right(casts, parameters)
    assert copied == [5]


def test_what_is_no_parameter_or_needs_none_is_not_kept(parameters: list[nn.Parameter]) -> None:
    casts = Casts()
    plain = torch.randn(3, 4)
    assert torch.equal(casts.of(plain, HALF), plain.to(HALF))
    assert casts.of(parameters[0], torch.float32) is parameters[0]
    assert not casts._copies


def test_a_copy_goes_with_its_parameter(parameters: list[nn.Parameter]) -> None:
    casts = Casts()
    assert_right(casts, parameters)
    del parameters[1:]
    gc.collect()
    casts.refresh()
    assert len(casts._copies) == 1
