"""The operations of affine tuning against the chain of moves and float64, and torch's checks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from graft.formats.base import GridUpdate, LowRank, Scaled
from graft.formats.int_group import IntGroupFormat
from graft.kernels.backend.native_library import native
from graft.kernels.frozen.ops import linear
from graft.kernels.low_rank.ops import low_rank_product
from graft.kernels.moves import ops

OUT, IN = 22, 96


@pytest.mark.parametrize("statistics", ["float16", "float32"])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 8), (3, 32), (4, 32), (8, 64)])
def test_affine_linear_is_the_chain_through_the_moved_statistics(
    bits: int, group_size: int, statistics: str
) -> None:
    weight_format = IntGroupFormat(bits, group_size, statistics)
    packed = weight_format.pack(torch.randn(OUT, IN))
    moves = [torch.randn(OUT, -(-IN // group_size)) * 0.1 for _ in range(2)]
    ours = [t.requires_grad_() for t in (torch.randn(9, IN), *moves)]
    x, u, v = ours
    weight = weight_format.kernel_weight(packed, OUT, IN)
    y = ops.affine_linear(x, weight, u, v)
    grad = torch.randn_like(y)
    y.backward(grad)
    others = [t.detach().clone().requires_grad_() for t in ours]
    update = GridUpdate(scales=Scaled(others[1]), offsets=Scaled(others[2]))
    absorbed = weight_format.absorb(packed, update)
    expected = linear(others[0], weight_format.kernel_weight(absorbed, OUT, IN))
    expected.backward(grad)
    assert torch.equal(y, expected)
    for got, other in zip(ours, others, strict=True):
        torch.testing.assert_close(got.grad, other.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rounds", [False, True], ids=["exact", "rounded"])
@pytest.mark.parametrize("statistics", ["float16", "float32"])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 8), (3, 32), (4, 32), (8, 64)])
def test_qalora_grid_linear_is_the_chain_through_the_moved_statistics(
    bits: int, group_size: int, statistics: str, rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not rounds:  # the reference's formula, with the native product in floats
        monkeypatch.delitem(native.operations, "grad_factors", raising=False)
    weight_format = IntGroupFormat(bits, group_size, statistics)
    packed = weight_format.pack(torch.randn(OUT, IN))
    groups = -(-IN // group_size)
    shapes = ((9, IN), (3, groups), (OUT, 3), (2, groups), (OUT, 2))
    ours = [(torch.randn(shape) * 0.3).requires_grad_() for shape in shapes]
    x, A, B, u_A, u_B = ours
    weight = weight_format.kernel_weight(packed, OUT, IN)
    y = ops.qalora_grid_linear(x, weight, A, B, 0.7, u_A, u_B)
    grad = torch.randn_like(y)
    y.backward(grad)
    others = [t.detach().clone().requires_grad_() for t in ours]
    x, A, B, u_A, u_B = others
    update = GridUpdate(scales=Scaled(low_rank_product(u_A, u_B)), offsets=LowRank(A, B, 0.7))
    absorbed = weight_format.absorb(packed, update)
    expected = linear(x, weight_format.kernel_weight(absorbed, OUT, IN))
    expected.backward(grad)
    assert torch.equal(y, expected)
    gradients = [(got.grad, other.grad) for got, other in zip(ours, others, strict=True)]
    for got, other in gradients[: 3 if rounds else 5]:
        torch.testing.assert_close(got, other, rtol=1e-5, atol=1e-5)
    for got, other in gradients[3:]:
        assert error(got, other) < 0.06  # of few tokens, and of few numbers


def error(got: Tensor, exact: Tensor) -> float:
    """Return the relative error."""
    return float((got - exact).norm() / exact.norm())


def test_opcheck(opcheck: Callable[..., None]) -> None:
    packed = IntGroupFormat().pack(torch.randn(OUT, IN))
    weight = IntGroupFormat().kernel_weight(packed, OUT, IN)
    u, v = (torch.zeros(OUT, IN // 32, requires_grad=True) for _ in range(2))
    x = torch.randn(2, 3, IN, requires_grad=True)
    opcheck(ops.affine_linear, (x, weight, u, v))
    factors = [torch.randn(shape, requires_grad=True) for shape in ((2, 3), (OUT, 2))]
    opcheck(ops.qalora_grid_linear, (x, weight, *factors, 1.0, *factors))
    frozen = [factor.detach() for factor in factors]
    opcheck(ops.move_by_factors, (*weight.statistics, *frozen, 1.0, *frozen))
    moves = packed["offsets"], packed["scales"], u.detach(), torch.float16
    opcheck(ops.move_scaled, moves)
