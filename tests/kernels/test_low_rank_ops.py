"""The operations of adapted layers against float64, and by torch's own checks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from graft.formats.base import WeightFormat
from graft.formats.codebook import CodebookFormat
from graft.formats.dense import DenseFormat
from graft.formats.int8 import Int8Format
from graft.formats.int_group import IntGroupFormat
from graft.kernels.frozen.ops import linear
from graft.kernels.low_rank import ops

OUT, IN, RANK, SCALING = 22, 96, 3, 0.75
FORMATS: list[WeightFormat] = [
    DenseFormat(),
    CodebookFormat(double_quant=True),
    Int8Format(),
    IntGroupFormat(bits=3, group_size=16),
]


def factors(columns: int) -> tuple[Tensor, Tensor]:
    return (
        torch.randn(RANK, columns, requires_grad=True),
        torch.randn(OUT, RANK, requires_grad=True),
    )


@pytest.mark.parametrize("weight_format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("tokens", [1, 4, 5, 33])
def test_lora_linear_and_its_gradients_equal_float64(
    weight_format: WeightFormat, tokens: int
) -> None:
    packed = weight_format.pack(torch.randn(OUT, IN))
    weight = weight_format.kernel_weight(packed, OUT, IN)
    dense = weight_format.unpack(packed, OUT, IN, torch.float32).double()
    x = torch.randn(tokens, IN, requires_grad=True)
    A, B = factors(IN)
    y, hidden = ops.lora_linear(x, weight, A, B, SCALING)
    grad = torch.randn_like(y)
    y.backward(grad)
    exact = [t.detach().double().requires_grad_() for t in (x, A, B)]
    x64, A64, B64 = exact
    y64 = x64 @ dense.T + SCALING * (x64 @ A64.T) @ B64.T
    y64.backward(grad.double())
    torch.testing.assert_close(y.double(), y64, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(hidden.double(), SCALING * x64 @ A64.T, rtol=1e-5, atol=1e-4)
    for got, expected in zip((x, A, B), exact, strict=True):
        assert got.grad.dtype == torch.float32
        torch.testing.assert_close(got.grad.double(), expected.grad, rtol=1e-5, atol=2e-4)


def test_gradients_of_the_factors_without_one_of_the_input() -> None:
    packed = CodebookFormat().pack(torch.randn(OUT, IN))
    weight = CodebookFormat().kernel_weight(packed, OUT, IN)
    found = []
    for needs_input in (True, False):
        torch.manual_seed(0)
        x = torch.randn(7, IN).requires_grad_(needs_input)
        A, B = factors(IN)
        ops.lora_linear(x, weight, A, B, SCALING)[0].square().sum().backward()
        found.append((A.grad, B.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_qalora_gradients_are_those_of_the_moved_offsets(bits: int) -> None:
    """Against the chain through move_offsets and the offsets' own gradient, rounding and all."""
    from graft.formats.base import GridUpdate, LowRank

    weight_format = IntGroupFormat(bits=bits, group_size=8)
    packed = weight_format.pack(torch.randn(OUT, IN))
    x = torch.randn(9, IN, requires_grad=True)
    A, B = factors(IN // 8)
    weight = weight_format.kernel_weight(packed, OUT, IN)
    y, pooled = ops.qalora_linear(x, weight, A, B, SCALING)
    torch.testing.assert_close(pooled, x.unflatten(-1, (-1, 8)).sum(-1))
    grad = torch.randn_like(y)
    y.backward(grad)
    others = [t.detach().clone().requires_grad_() for t in (x, A, B)]
    update = GridUpdate(offsets=LowRank(others[1], others[2], SCALING))
    absorbed = weight_format.absorb(packed, update)
    expected = linear(others[0], weight_format.kernel_weight(absorbed, OUT, IN))
    expected.backward(grad)
    assert torch.equal(y, expected)
    for got, other in zip((x, A, B), others, strict=True):
        torch.testing.assert_close(got.grad, other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_offsets_are_moved_in_float64_and_rounded_once(stored: torch.dtype) -> None:
    offsets = torch.randn(OUT, 40).to(stored)
    A, B = torch.randn(RANK, 40), torch.randn(OUT, RANK) * 1e-3
    moved = ops.move_offsets(offsets, A, B, SCALING, stored)
    exact = offsets.double() + SCALING * (B.double() @ A.double())
    assert moved.dtype == torch.float32
    assert torch.equal(moved, exact.to(stored).float())


def test_opcheck(opcheck: Callable[..., None]) -> None:
    packed = IntGroupFormat().pack(torch.randn(OUT, IN))
    weight = IntGroupFormat().kernel_weight(packed, OUT, IN)
    x, grad = torch.randn(2, 3, IN), torch.randn(2, 3, OUT)
    A, B = factors(IN)
    opcheck(ops.lora_linear, (x, weight, A, B, SCALING))
    frozen = A.detach(), B.detach()
    opcheck(ops.lora_grad_input, (grad, weight, *frozen, SCALING))
    opcheck(ops.token_product, (grad, x))
    A, B = factors(IN // 32)
    opcheck(ops.move_offsets, (packed["offsets"], A, B, SCALING, torch.float16))
    opcheck(ops.qalora_linear, (x, weight, A, B, SCALING))
