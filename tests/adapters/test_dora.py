from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from graft.adapters import dora
from graft.adapters.adapted import AdaptedLinear
from graft.adapters.attach import adapted_layer, attach_adapter
from graft.adapters.config import AdapterConfig
from graft.adapters.dora import DoraAdapter
from graft.adapters.lora import LoraAdapter
from graft.adapters.merge import merge
from graft.adapters.qalora import QALoraAdapter
from graft.adapters.starts.loftq import LoftQ
from graft.adapters.starts.low_rank import set_starts
from graft.formats.codebook import CodebookFormat
from graft.formats.dense import DenseFormat
from graft.formats.int8 import Int8Format
from graft.formats.int_group import IntGroupFormat
from graft.layers.frozen import FrozenLinear

FORMATS = [
    DenseFormat(),
    DenseFormat("bfloat16"),
    CodebookFormat(double_quant=True),
    IntGroupFormat(group_size=8),
    Int8Format(),
]


def dora_layer(base: FrozenLinear, randomise, **options) -> tuple[AdaptedLinear, DoraAdapter]:
    """A layer whose rows are turned, and stretched or shrunk by up to about a half."""
    adapter = DoraAdapter(base, rank=3, alpha=5.0, **options)
    lengths = adapter.magnitude.detach().clone()
    randomise(adapter, 0.4)
    with torch.no_grad():
        adapter.magnitude.copy_(lengths * (1 + 0.3 * torch.randn(len(lengths))))
    layer = AdaptedLinear(base)
    layer.add("default", adapter)
    return layer, adapter


def weight_by_loops(adapter: DoraAdapter, base: FrozenLinear, scaling: float) -> list[list[float]]:
    """W' = m (W + s B A) / |W + s B A|, one element at a time, in float64."""
    W, A, B = base.dense_weight().tolist(), adapter.A.tolist(), adapter.B.tolist()
    rows = []
    for w, b, m in zip(W, B, adapter.magnitude.tolist(), strict=True):
        row = [
            w[i] + scaling * math.fsum(b[r] * A[r][i] for r in range(len(b))) for i in range(len(w))
        ]
        norm = math.sqrt(math.fsum(value * value for value in row))
        rows.append([m * value / norm for value in row])
    return rows


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("rslora", [False, True])
def test_forward_and_delta_equal_a_float64_loop(weight_format, rslora, frozen, randomise) -> None:
    base = frozen(weight_format)
    layer, adapter = dora_layer(base, randomise, rslora=rslora)
    scaling = 5 / (math.sqrt(3) if rslora else 3)
    moved = torch.tensor(weight_by_loops(adapter, base, scaling), dtype=torch.float64)
    x = torch.randn(2, 4, 44)
    expected = x.double() @ moved.T + base.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.effective_weight(), moved, rtol=1e-12, atol=1e-12)
    assert not layer.effective_weight().requires_grad
    plain = LoraAdapter.delta(adapter, base) + base.dense_weight().double()
    assert (plain - moved).abs().max() > 0.1  # the lengths matter


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_fresh_adapter_changes_nothing(weight_format, frozen) -> None:
    base = frozen(weight_format)
    layer = AdaptedLinear(base)
    adapter = DoraAdapter(base, rank=3)
    layer.add("default", adapter)
    x = torch.randn(4, 44)
    assert torch.equal(layer(x), base(x))
    lengths = base.dense_weight().double().norm(dim=1)
    torch.testing.assert_close(adapter.magnitude.double(), lengths, rtol=1e-7, atol=0)
    assert {name for name, _ in layer.named_parameters() if "adapters" in name} == {
        f"adapters.default.{name}" for name in ("A", "B", "magnitude")
    }
    assert not any("squares" in name for name in layer.state_dict())


def reference(
    x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, m: Tensor, constant: bool = True
) -> Tensor:
    moved = W + (5 / 3) * B @ A
    norm = moved.norm(dim=1)
    return x @ ((m / (norm.detach() if constant else norm))[:, None] * moved).T + bias


@pytest.mark.parametrize("weight_format", FORMATS)
def test_gradients_equal_float64_with_a_constant_norm(weight_format, frozen, randomise) -> None:
    base = frozen(weight_format)
    layer, adapter = dora_layer(base, randomise)
    x, grad = torch.randn(7, 44, requires_grad=True), torch.randn(7, 6)
    layer(x).backward(grad)
    leaves = [x, adapter.A, adapter.B, adapter.magnitude]
    frozen_part = base.dense_weight().double(), base.bias.double()
    for constant in (True, False):
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        reference(wide[0], *frozen_part, *wide[1:], constant).backward(grad.double())
        if constant:
            for mine, true in zip(leaves, wide, strict=True):
                torch.testing.assert_close(mine.grad.double(), true.grad, rtol=1e-4, atol=1e-4)
        else:
            assert (adapter.B.grad.double() - wide[2].grad).abs().max() > 0.1
    assert all(parameter.grad is None for parameter in base.parameters())


def test_a_row_of_zeros_stays_one_and_no_number_is_lost(randomise) -> None:
    weight = torch.randn(6, 44)
    weight[2] = 0
    base = FrozenLinear(44, 6, DenseFormat(), {"weight": weight})
    layer = AdaptedLinear(base)
    adapter = DoraAdapter(base, rank=3)
    layer.add("default", adapter)
    layer(torch.randn(5, 44)).square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in adapter.parameters())
    assert not layer(torch.randn(5, 44))[:, 2].any()
    assert bool(layer.effective_weight().isfinite().all())


def test_norms_of_rows_that_the_update_nearly_cancels(frozen, randomise) -> None:
    base = frozen(DenseFormat())
    adapter = randomise(DoraAdapter(base, rank=6))
    with torch.no_grad():
        left, sizes, right = torch.linalg.svd(base.dense_weight(), full_matrices=False)
        adapter.A.copy_(sizes[:, None] * right)
        adapter.B.copy_(-0.99 * left)
    moved = LoraAdapter.delta(adapter, base) + base.dense_weight().double()
    expected = moved.norm(dim=1)
    assert expected.max() < 0.02 * base.dense_weight().norm(dim=1).max()
    torch.testing.assert_close(adapter.norms(base).double(), expected, rtol=1e-3, atol=0)
    with torch.no_grad():
        adapter.B.copy_(-left)
    assert bool(adapter.norms(base).isfinite().all())


def test_dropout_leaves_the_base_alone(frozen, randomise) -> None:
    base = frozen(CodebookFormat())
    layer, adapter = dora_layer(base, randomise, dropout=0.5)
    x = torch.randn(9, 44)
    weight, moved = base.dense_weight().double(), layer.effective_weight()
    layer.train()
    for other in ((), ("other",)):  # fused, and beside another adapter
        if other:
            layer.add("other", LoraAdapter(44, 6, rank=2))
        torch.manual_seed(4)
        y = layer(x)
        torch.manual_seed(4)
        dropped = functional.dropout(x, 0.5, True).double()
        expected = x.double() @ weight.T + dropped @ (moved - weight).T + base.bias.double()
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    layer.eval()
    torch.testing.assert_close(
        layer(x).double(), x.double() @ moved.T + base.bias.double(), rtol=1e-5, atol=1e-5
    )


def test_in_bfloat16_a_small_move_of_a_magnitude_is_not_lost(frozen) -> None:
    base = frozen(DenseFormat("bfloat16"))
    layer = AdaptedLinear(base)
    adapter = DoraAdapter(base, rank=3)
    layer.add("default", adapter)
    x = torch.randn(500, 44).bfloat16()
    before = layer(x)
    with torch.no_grad():
        adapter.magnitude.mul_(1 + 3e-3)
    after = layer(x)
    assert after.dtype == torch.bfloat16
    moved = (after != before).float().mean().item()
    assert 0.3 < moved < 0.9  # 1.003 itself is 1 in bfloat16
    after.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in adapter.parameters())


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_merge_is_dense_and_the_same_layer(weight_format, frozen, randomise) -> None:
    base = frozen(weight_format)
    layer, _ = dora_layer(base, randomise)
    assert not layer.moves_grid_only()
    result = merge(layer)
    assert result.layer.weight_format == DenseFormat("float32")
    assert torch.equal(result.layer.bias, base.bias)
    x = torch.randn(5, 44)
    torch.testing.assert_close(result.layer(x), layer(x), rtol=1e-5, atol=1e-5)
    assert result.error.relative_to_update < 1e-6


def test_adapters_add_up_whatever_their_kind_and_order(frozen, randomise) -> None:
    base = frozen(IntGroupFormat(group_size=8))
    layer, first = dora_layer(base, randomise)
    second = randomise(DoraAdapter(base, rank=2))
    layer.add("second", second)
    layer.add("lora", randomise(LoraAdapter(44, 6, rank=2)))
    layer.add("grid", randomise(QALoraAdapter(44, 6, 8, rank=2)))
    x = torch.randn(5, 44)
    for active in (("default", "second"), ("second", "default"), ("default", "lora", "grid")):
        layer.active = active
        expected = x.double() @ layer.effective_weight().T + base.bias.double()
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=2e-5)
    layer.active = ("default", "second")
    both = base.dense_weight().double() + first.delta(base) + second.delta(base)
    torch.testing.assert_close(layer.effective_weight(), both)
    layer.active = ()
    assert torch.equal(layer(x), base(x))


def test_without_gradients_the_norms_are_kept_until_something_changes(
    frozen, randomise, monkeypatch
) -> None:
    base = frozen(DenseFormat())
    layer, adapter = dora_layer(base, randomise)
    calls = []

    def counted(*arguments):
        calls.append(1)
        return norms(*arguments)

    norms = dora.dora_norms
    monkeypatch.setattr(dora, "dora_norms", counted)
    x = torch.randn(5, 44)
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(layer(x), first) and len(calls) == 1
        for parameter in adapter.parameters():
            parameter.mul_(1.5)
            second = layer(x)
            assert not torch.equal(second, first)
            first = second
    assert len(calls) == 4
    layer(x)
    adapter.magnitude.data.mul_(2)  # as an optimizer may that PyTorch does not see
    with torch.no_grad():
        assert not torch.equal(layer(x), first)
    assert len(calls) == 6


def test_dora_starts_where_loftq_leaves_the_weight() -> None:
    weight, weight_format = torch.randn(32, 48), CodebookFormat()
    loftq = LoftQ(8, scaling=2.0, rounds=3)
    packed = loftq.pack("0", weight, weight_format, weight_format.pack)
    model = torch.nn.Sequential(FrozenLinear(48, 32, weight_format, packed))
    attach_adapter(model, ["0"], AdapterConfig(method="qlora", rank=8, alpha=16.0, dora=True))
    set_starts(model, loftq.starts)
    lost = (adapted_layer(model, "0").effective_weight() - weight.double()).square().sum().item()
    assert lost == pytest.approx(loftq.starts["0"].error, rel=1e-4)
