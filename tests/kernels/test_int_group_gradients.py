"""The group-wise integer linear against dense float64 autograd, in x, scales and offsets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graft.kernels.frozen import ops
from graft.kernels.packed.planes import pack_codes
from graft.kernels.packed.weight import Layout, Weight, int_group_weight


def dense_weight(codes: Tensor, scales: Tensor, offsets: Tensor, group_size: int) -> Tensor:
    rows = [
        torch.stack(
            [
                scales[o, j // group_size] * codes[o, j].double() + offsets[o, j // group_size]
                for j in range(codes.shape[1])
            ]
        )
        for o in range(codes.shape[0])
    ]
    return torch.stack(rows)


def weight_of(
    codes: Tensor, scales: Tensor, offsets: Tensor, bits: int = 4, group_size: int = 8
) -> Weight:
    layout = Layout("int_group", *codes.shape, bits, group_size)
    return int_group_weight(pack_codes(codes, bits), scales, offsets, layout)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("in_features", "group_size"), [(5, 8), (43, 8), (64, 32), (70, 32)])
def test_gradients_equal_float64(bits: int, in_features: int, group_size: int) -> None:
    out_features, groups = 4, -(-in_features // group_size)
    codes = torch.randint(0, 2**bits, (out_features, in_features), dtype=torch.uint8)
    x = torch.randn(2, 7, in_features)
    scales, offsets = torch.rand(out_features, groups) / 2**bits, torch.randn(out_features, groups)
    grad = torch.randn(2, 7, out_features)

    ours = [tensor.clone().requires_grad_() for tensor in (x, scales, offsets)]
    y = ops.linear(ours[0], weight_of(codes, *ours[1:], bits, group_size))
    y.backward(grad)

    truth = [tensor.double().requires_grad_() for tensor in (x, scales, offsets)]
    expected = truth[0] @ dense_weight(codes, truth[1], truth[2], group_size).T
    expected.backward(grad.double())

    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    for mine, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine.grad.double(), true.grad, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("trained", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)])
def test_only_what_needs_a_gradient_gets_one(trained: tuple[int, int, int]) -> None:
    codes = torch.randint(0, 16, (3, 16), dtype=torch.uint8)
    tensors = [torch.randn(2, 16), torch.rand(3, 2), torch.randn(3, 2)]
    for tensor, wanted in zip(tensors, trained, strict=True):
        tensor.requires_grad_(bool(wanted))
    ops.linear(tensors[0], weight_of(codes, *tensors[1:])).square().sum().backward()
    assert [tensor.grad is not None for tensor in tensors] == [bool(wanted) for wanted in trained]


def test_a_frozen_layer_does_not_keep_its_input() -> None:
    codes = torch.randint(0, 16, (3, 16), dtype=torch.uint8)
    x = torch.randn(2, 16, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.linear(x, weight_of(codes, torch.rand(3, 2), torch.randn(3, 2)))
    assert saved
    assert all(tensor.data_ptr() != x.data_ptr() for tensor in saved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_statistics_gradients_are_float32_whatever_x_is(dtype: torch.dtype) -> None:
    codes = torch.randint(0, 16, (3, 16), dtype=torch.uint8)
    x = torch.randn(50, 16, dtype=dtype)
    scales, offsets = torch.rand(3, 2).requires_grad_(), torch.randn(3, 2).requires_grad_()
    y = ops.linear(x, weight_of(codes, scales, offsets))
    y.backward(torch.ones_like(y))
    assert y.dtype == dtype
    assert scales.grad.dtype == offsets.grad.dtype == torch.float32
    pooled = x.double().sum(0).reshape(2, 8).sum(1)
    torch.testing.assert_close(offsets.grad.double(), pooled.expand(3, 2), rtol=1e-5, atol=1e-4)
