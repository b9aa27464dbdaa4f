"""QA-LoRA and affine: adapters that move scales and offsets."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from torch import Tensor

from graft.adapters.adapted import AdaptedLinear
from graft.adapters.affine import AffineAdapter
from graft.adapters.qalora import QALoraAdapter
from graft.errors import GraftError
from graft.formats.codebook import CodebookFormat
from graft.formats.dense import DenseFormat
from graft.formats.int_group import IntGroupFormat
from graft.kernels.backend.native_library import native
from graft.kernels.packed.planes import unpack_codes

GRIDS = [(2, 8), (3, 8), (4, 32), (8, 32)]


def grid_of(base) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, and scales and offsets repeated to every column; float64."""
    weight_format, packed = base.weight_format, base.packed
    planes = tuple(packed[name] for name in ("codes", "codes_high") if name in packed)
    codes = unpack_codes(planes, weight_format.bits, base.in_features).double()
    group = torch.arange(base.in_features) // weight_format.group_size
    return codes, packed["scales"].double()[:, group], packed["offsets"].double()[:, group]


def qalora_layer(
    frozen, randomise, bits: int, group_size: int, rslora: bool = False, grid_rank: int = 0
):
    base = frozen(IntGroupFormat(bits=bits, group_size=group_size))
    adapter = QALoraAdapter(
        44, 6, group_size, rank=3, alpha=5.0, rslora=rslora, grid_rank=grid_rank
    )
    randomise(adapter)
    layer = AdaptedLinear(base)
    layer.add("default", adapter)
    return base, adapter, layer


def moving_layer(frozen, randomise, bits: int, group_size: int):
    """QA-LoRA that moves the scales too."""
    return qalora_layer(frozen, randomise, bits, group_size, grid_rank=2)


def affine_layer(frozen, randomise, bits: int, group_size: int):
    base = frozen(IntGroupFormat(bits=bits, group_size=group_size))
    adapter = randomise(AffineAdapter(6, -(-44 // group_size)))
    layer = AdaptedLinear(base)
    layer.add("default", adapter)
    return base, adapter, layer


def half(value: Tensor) -> Tensor:
    """Round float64 to float16 once, which torch does by way of float32."""
    return torch.tensor(float(numpy.float16(value.item())), dtype=torch.float64)


@pytest.mark.parametrize("grid_rank", [0, 2])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), GRIDS)
def test_qalora_forward_equals_a_float64_loop(
    bits: int, group_size: int, rslora: bool, grid_rank: int, frozen, randomise
) -> None:
    base, adapter, layer = qalora_layer(frozen, randomise, bits, group_size, rslora, grid_rank)
    codes, scales, offsets = grid_of(base)
    scaling = 5 / (math.sqrt(3) if rslora else 3)
    A, B = adapter.A.double(), adapter.B.double()
    u = (adapter.u_B @ adapter.u_A).double() if grid_rank else torch.zeros(6, len(A[0])).double()
    x = torch.randn(4, 44)
    expected = torch.zeros(4, 6, dtype=torch.float64)
    for row in range(4):
        for o in range(6):
            total = base.bias[o].double()
            for j in range(44):
                g = j // group_size
                move = scaling * sum(B[o, r] * A[r, g] for r in range(adapter.rank))
                # What is deployed: the moved statistics as fp16 stores them.
                offset = half(offsets[o, j] + move)
                scale = half(scales[o, j] + scales[o, j] * u[o, g])
                total = total + (scale * codes[o, j] + offset) * x[row, j].double()
            expected[row, o] = total
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("bits", "group_size"), GRIDS)
def test_affine_forward_equals_a_float64_loop(bits, group_size, frozen, randomise) -> None:
    base, adapter, layer = affine_layer(frozen, randomise, bits, group_size)
    codes, scales, offsets = grid_of(base)
    x = torch.randn(4, 44)
    expected = base.bias.double().repeat(4, 1)
    for o in range(6):
        for j in range(44):
            u, v = adapter.u[o, j // group_size].double(), adapter.v[o, j // group_size].double()
            scale = half(scales[o, j] + scales[o, j] * u)
            offset = half(offsets[o, j] + scales[o, j] * v)
            expected[:, o] += (scale * codes[o, j] + offset) * x[:, j].double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [qalora_layer, moving_layer, affine_layer])
@pytest.mark.parametrize(("bits", "group_size"), GRIDS)
def test_delta_is_the_unrounded_update(make, bits: int, group_size: int, frozen, randomise) -> None:
    base, adapter, layer = make(frozen, randomise, bits, group_size)
    unrounded = base.dense_weight().double() + adapter.delta(base)
    packed = base.packed
    # Rounding to fp16 moves each statistic by at most half an ulp.
    moved = layer.effective_packed()
    group = torch.arange(44) // group_size
    levels = 2**bits - 1
    bound = (moved["scales"].double().abs() * levels + moved["offsets"].double().abs()) * 2**-11
    error = (layer.effective_weight() - unrounded).abs()
    assert bool((error <= bound[:, group] * 1.001 + 2**-24).all())
    assert not torch.equal(layer.effective_weight(), base.dense_weight().double())
    assert torch.equal(moved["codes"], packed["codes"])


def test_qalora_is_a_lora_whose_a_is_repeated(frozen, randomise) -> None:
    base, adapter, _ = qalora_layer(frozen, randomise, 4, 32)
    expanded = adapter.expanded_a(44)
    assert expanded.shape == (2, 44)  # rank 3 was asked for, and 44 inputs are two groups
    for j in range(44):
        assert torch.equal(expanded[:, j], adapter.A[:, j // 32])
    expected = adapter.scaling * (adapter.B.double() @ expanded.double())
    torch.testing.assert_close(adapter.delta(base), expected)


@pytest.mark.parametrize("make", [qalora_layer, moving_layer, affine_layer])
def test_a_fresh_adapter_changes_nothing(make, frozen) -> None:
    base, adapter, layer = make(frozen, lambda adapter: adapter, 4, 8)
    x = torch.randn(3, 44)
    assert torch.equal(layer(x), base(x))
    assert torch.equal(layer.effective_weight(), base.dense_weight().double())
    assert not any(p.any() for name, p in adapter.named_parameters() if name not in ("A", "u_A"))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_qalora_gradients_pass_straight_through_the_rounding(bits, frozen, randomise) -> None:
    base, adapter, layer = qalora_layer(frozen, randomise, bits, 8)
    x, grad = torch.randn(7, 44), torch.randn(7, 6)
    layer(x).backward(grad)
    A, B = (t.detach().double().requires_grad_() for t in (adapter.A, adapter.B))
    group = torch.arange(44) // 8
    update = (B @ A)[:, group] * adapter.scaling
    (x.double() @ update.T).backward(grad.double())
    for mine, true in ((adapter.A, A), (adapter.B, B)):
        torch.testing.assert_close(mine.grad.double(), true.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rounds", [False, True], ids=["exact", "rounded"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gradients_of_moving_scales_pass_straight_through(
    bits, rounds, frozen, randomise, monkeypatch
) -> None:
    if not rounds:  # the reference's formula, in floats
        monkeypatch.delitem(native.operations, "grad_factors", raising=False)
    base, adapter, layer = moving_layer(frozen, randomise, bits, 8)
    codes, scales, _ = grid_of(base)
    x, grad = torch.randn(7, 44), torch.randn(7, 6)
    layer(x).backward(grad)
    names = ("A", "B", "u_A", "u_B")
    A, B, u_A, u_B = (
        adapter.get_parameter(name).detach().double().requires_grad_() for name in names
    )
    group = torch.arange(44) // 8
    update = (B @ A)[:, group] * adapter.scaling + scales * codes * (u_B @ u_A)[:, group]
    (x.double() @ update.T).backward(grad.double())
    for name, true in zip(names, (A, B, u_A, u_B), strict=True):
        mine = adapter.get_parameter(name).grad.double()
        if rounds and name in ("u_A", "u_B"):
            assert (mine - true.grad).norm() < 0.06 * true.grad.norm()  # of few tokens
        else:
            torch.testing.assert_close(mine, true.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_affine_gradients_pass_straight_through_the_rounding(bits, frozen, randomise) -> None:
    base, adapter, layer = affine_layer(frozen, randomise, bits, 8)
    codes, scales, _ = grid_of(base)
    x, grad = torch.randn(7, 44), torch.randn(7, 6)
    layer(x).backward(grad)
    u, v = (t.detach().double().requires_grad_() for t in (adapter.u, adapter.v))
    group = torch.arange(44) // 8
    (x.double() @ (scales * (u[:, group] * codes + v[:, group])).T).backward(grad.double())
    for mine, true in ((adapter.u, u), (adapter.v, v)):
        torch.testing.assert_close(mine.grad.double(), true.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("weight_format", [DenseFormat(), CodebookFormat()])
def test_a_base_without_a_grid_is_told(weight_format, frozen) -> None:
    layer = AdaptedLinear(frozen(weight_format))
    layer.add("default", QALoraAdapter(44, 6, 8, rank=2))
    with pytest.raises(GraftError, match="cannot absorb a qalora update; quantise the base"):
        layer(torch.randn(2, 44))


@pytest.mark.parametrize("in_features", [64, 172, 512])
def test_qalora_draws_a_as_lora_does(in_features: int) -> None:
    bound = 1 / math.sqrt(in_features)
    adapter = QALoraAdapter(in_features, 8, group_size=8, rank=7)
    assert bound * 0.7 < adapter.A.abs().max() <= bound
    assert not adapter.B.any()


@pytest.mark.parametrize(("rank", "grid_rank"), [(6, 6), (16, 40)])
def test_a_rank_that_covers_all_groups_starts_as_the_identity(rank, grid_rank) -> None:
    adapter = QALoraAdapter(172, 8, group_size=32, rank=rank, grid_rank=grid_rank)
    assert (adapter.rank, adapter.grid_rank, adapter.scaling) == (6, 6, 1.0)
    torch.testing.assert_close(adapter.A, torch.eye(6) * math.sqrt(rank / 172))
    assert torch.equal(adapter.u_A, torch.eye(6))
    halved = QALoraAdapter(172, 8, group_size=32, rank=16, alpha=8.0)
    assert halved.scaling == 0.5, "the rank that was asked for divides alpha"
