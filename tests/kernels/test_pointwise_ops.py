"""RMSNorm and SiLU gates against float64, by torch's own checks, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from levels import LEVELS, using
from torch import Tensor

from graft.kernels.pointwise import native as native_pointwise
from graft.kernels.pointwise import ops
from graft.kernels.pointwise import reference as reference_pointwise

SHAPES = [(1, 1), (3, 7), (2, 5, 64), (17, 130)]


@pytest.fixture(params=["reference", *LEVELS])
def backend(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "reference":
        yield reference_pointwise
        return
    with using(request.param):
        yield native_pointwise


def assert_near(got: Tensor, exact: Tensor, dtype: torch.dtype, size: float = 0) -> None:
    """Within a few roundings to the dtype, of the number itself or of what it is the difference."""
    error, size = (got.double() - exact).abs(), max(size, 0.05 * exact.abs().max().item())
    assert got.dtype == dtype
    assert (error <= 5 * torch.finfo(dtype).eps * (exact.abs() + size)).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_and_its_gradient_equal_float64(backend: Any, shape: Any, dtype: torch.dtype) -> None:
    x, grad = (torch.randn(shape).to(dtype) for _ in range(2))
    weight = (1 + 0.2 * torch.randn(shape[-1])).to(dtype)
    exact = x.double().requires_grad_()
    scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5)
    expected = exact * scale * weight.double()
    expected.backward(grad.double())
    y, own = backend.rms_norm(x, weight, 1e-5)
    assert_near(y, expected.detach(), dtype)
    torch.testing.assert_close(own.double(), scale.detach().squeeze(-1), rtol=1e-6, atol=0)
    size = (grad.double() * weight * scale).abs().max().item()
    assert_near(backend.rms_norm_backward(grad, x, weight, own), exact.grad, dtype, size)


@pytest.mark.parametrize("shape", [*SHAPES, (3, 1500)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gate_and_its_gradients_equal_float64(backend: Any, shape: Any, dtype: torch.dtype) -> None:
    gate, up, grad = (3 * torch.randn(shape).to(dtype) for _ in range(3))
    exact = [tensor.double().requires_grad_() for tensor in (gate, up)]
    expected = torch.nn.functional.silu(exact[0]) * exact[1]
    expected.backward(grad.double())
    assert_near(backend.silu_gate(gate, up), expected.detach(), dtype)
    for got, tensor in zip(backend.silu_gate_backward(grad, gate, up), exact, strict=True):
        assert_near(got, tensor.grad, dtype)


def test_gates_far_from_zero(backend: Any) -> None:
    gate = torch.tensor([-200.0, -90.0, 0.0, 90.0, 200.0])
    up = torch.full_like(gate, 2.0)
    torch.testing.assert_close(backend.silu_gate(gate, up), torch.tensor([0.0, 0, 0, 180, 400]))
    slopes = backend.silu_gate_backward(torch.ones_like(gate), gate, up)[0]
    torch.testing.assert_close(slopes, torch.tensor([0.0, 0, 1, 2, 2]))


def test_by_torch_s_own_checks(opcheck: Callable[..., None]) -> None:
    x = torch.randn(2, 3, 20, requires_grad=True)
    opcheck(ops.rms_norm, (x, torch.rand(20), 1e-6))
    frozen, scale = x.detach(), torch.rand(2, 3)
    opcheck(ops.rms_norm_backward, (frozen, frozen, torch.rand(20), scale))
    opcheck(ops.silu_gate, (x, torch.randn(2, 3, 20, requires_grad=True)))
    opcheck(ops.silu_gate_backward, (frozen, frozen, frozen))
    q, k = torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(2, 1, 5, 8, requires_grad=True)
    opcheck(ops.rotary, (q, k, torch.randn(1, 5, 8), torch.randn(1, 5, 8), False))


def test_rotary_positions_and_their_gradients() -> None:
    q, k = (torch.randn(2, n, 5, 8, dtype=torch.float64, requires_grad=True) for n in (3, 1))
    cos, sin = (torch.randn(1, 5, 8, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *qk: ops.rotary(*qk, cos, sin, False), (q, k))
    assert torch.autograd.gradcheck(lambda *qk: ops.rotary(*qk, cos, sin, True), (q, k))


def test_inputs_that_are_not_contiguous_and_other_dtypes() -> None:
    x = torch.randn(6, 20).T.requires_grad_()
    weight = torch.rand(6)
    y = ops.rms_norm(x, weight, 1e-6)[0]
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (6,), weight, 1e-6))
    grad = torch.ones(()).expand(20, 6)
    y.backward(grad)
    assert x.grad is not None and x.grad.shape == x.shape
    wide = torch.randn(3, 6, dtype=torch.float64)
    assert ops.silu_gate(wide, wide).dtype == torch.float64
    with torch.no_grad():
        assert ops.rms_norm(torch.randn(0, 6), weight, 1e-6)[0].shape == (0, 6)
