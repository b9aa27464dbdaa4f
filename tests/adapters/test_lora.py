from __future__ import annotations

import math

import pytest
import torch

from graft.adapters.adapted import AdaptedLinear
from graft.adapters.base import lora_scaling
from graft.adapters.lora import LoraAdapter
from graft.formats.codebook import CodebookFormat
from graft.formats.dense import DenseFormat
from graft.formats.int_group import IntGroupFormat

FORMATS = [DenseFormat(), CodebookFormat(double_quant=True), IntGroupFormat(group_size=8)]


@pytest.mark.parametrize(
    ("alpha", "rslora", "expected"),
    [(None, False, 1.0), (None, True, 4.0), (8.0, False, 0.5), (8.0, True, 2.0)],
)
def test_scaling(alpha, rslora: bool, expected: float) -> None:
    assert lora_scaling(16, alpha, rslora) == expected


def plain_forward(x, weight, bias, A, B, b, scaling) -> torch.Tensor:
    """y = W x + bias + s (B A x + b), in float64, one output at a time."""
    out = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.float64)
    for row, inputs in enumerate(x.double()):
        hidden = [sum((a * i).item() for a, i in zip(line, inputs, strict=True)) for line in A]
        for o in range(weight.shape[0]):
            low_rank = sum(B[o, r].item() * hidden[r] for r in range(len(hidden)))
            out[row, o] = weight[o] @ inputs + bias[o] + scaling * (low_rank + b[o].item())
    return out


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("rslora", [False, True])
def test_forward_equals_a_float64_loop(weight_format, rslora: bool, frozen, randomise) -> None:
    base = frozen(weight_format)
    adapter = randomise(LoraAdapter(44, 6, rank=3, alpha=5.0, rslora=rslora, bias=True))
    layer = AdaptedLinear(base)
    layer.add("default", adapter)
    x = torch.randn(4, 44)
    expected = plain_forward(
        x,
        base.dense_weight().double(),
        base.bias.double(),
        adapter.A.double(),
        adapter.B.double(),
        adapter.bias.double(),
        5 / math.sqrt(3) if rslora else 5 / 3,
    )
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_delta_is_the_update_of_weight_and_bias(frozen, randomise) -> None:
    base = frozen(DenseFormat())
    adapter = randomise(LoraAdapter(44, 6, rank=3, alpha=5.0, bias=True))
    layer = AdaptedLinear(base)
    layer.add("default", adapter)
    x = torch.randn(4, 44)
    weight = base.dense_weight().double() + adapter.delta(base)
    expected = x.double() @ weight.T + base.bias.double() + adapter.delta_bias()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.effective_weight(), weight, rtol=0, atol=0)
    assert not layer.effective_weight().requires_grad


def test_a_fresh_adapter_changes_nothing_and_a_is_random(frozen) -> None:
    base = frozen(DenseFormat())
    adapter = LoraAdapter(44, 6, rank=3, bias=True)
    layer = AdaptedLinear(base)
    layer.add("default", adapter)
    x = torch.randn(4, 44)
    assert torch.equal(layer(x), base(x))
    assert not adapter.B.any()
    assert not adapter.bias.any()
    assert adapter.A.abs().max() <= 1 / math.sqrt(44)  # PEFT's and nn.Linear's initialisation
    assert adapter.A.std() > 0.5 / math.sqrt(3 * 44)


def test_without_bias_there_is_none(frozen) -> None:
    adapter = LoraAdapter(44, 6, rank=3)
    assert adapter.delta_bias() is None
    assert {name for name, _ in adapter.named_parameters()} == {"A", "B"}


def test_gradients_equal_float64(frozen, randomise) -> None:
    base = frozen(CodebookFormat())
    adapter = randomise(LoraAdapter(44, 6, rank=3, alpha=5.0, bias=True))
    layer = AdaptedLinear(base)
    layer.add("default", adapter)
    x, grad = torch.randn(7, 44), torch.randn(7, 6)
    layer(x).backward(grad)
    A, B, b = (t.detach().double().requires_grad_() for t in (adapter.A, adapter.B, adapter.bias))
    expected = (x.double() @ A.T @ B.T + b) * (5 / 3)
    expected.backward(grad.double())
    for mine, true in ((adapter.A, A), (adapter.B, B), (adapter.bias, b)):
        torch.testing.assert_close(mine.grad.double(), true.grad, rtol=1e-5, atol=1e-5)
    assert all(parameter.grad is None for parameter in base.parameters())


def test_dropout_acts_in_training_only_and_on_the_low_rank_path_only(frozen, randomise) -> None:
    base = frozen(DenseFormat())
    layer = AdaptedLinear(base)
    layer.add("default", randomise(LoraAdapter(44, 6, rank=3, dropout=0.5)))
    x = torch.randn(200, 44)
    layer.eval()
    whole = layer(x) - base(x)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    first, second = layer(x) - base(x), layer(x) - base(x)
    assert not torch.equal(first, second)
    many = torch.stack([layer(x) - base(x) for _ in range(100)]).mean(0)
    assert (many - whole).abs().mean() < 0.2 * whole.abs().mean()  # inverted dropout: unbiased


def test_bfloat16_inputs_keep_their_dtype_and_parameters_stay_float32(frozen, randomise) -> None:
    layer = AdaptedLinear(frozen(DenseFormat()))
    adapter = randomise(LoraAdapter(44, 6, rank=3, bias=True))
    layer.add("default", adapter)
    y = layer(torch.randn(4, 44).bfloat16())
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in adapter.parameters())
