"""Frozen layers that round their inputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graft.adapters.adapted import AdaptedLinear
from graft.adapters.config import AdapterConfig
from graft.adapters.merge import merge
from graft.adapters.qalora import QALoraAdapter
from graft.errors import GraftError
from graft.formats.base import WeightFormat
from graft.formats.codebook import CodebookFormat
from graft.formats.int_group import IntGroupFormat
from graft.kernels.rounded.ops import rounded_inputs
from graft.layers.activations import check_activations, compute_with, computes_with
from graft.layers.frozen import FrozenLinear


def layer(weight_format: WeightFormat) -> FrozenLinear:
    return FrozenLinear(64, 40, weight_format, weight_format.pack(torch.randn(40, 64)))


def test_a_layer_of_integers_meets_rounded_inputs_with_and_without_gradients() -> None:
    frozen = layer(IntGroupFormat())
    x = torch.randn(20, 64)
    exact = frozen(x)
    compute_with(frozen, "q8")
    assert computes_with(frozen) == "q8"
    found, met = frozen(x), rounded_inputs(x, True)
    assert 1e-4 < (found - exact).norm() / exact.norm() < 1e-2
    torch.testing.assert_close(found, met @ frozen.dense_weight().T, rtol=0, atol=3e-2)
    x.requires_grad_(True)
    with_gradient = frozen(x)
    assert torch.equal(with_gradient, found)
    with_gradient.sum().backward()
    torch.testing.assert_close(x.grad, frozen.dense_weight().sum(0).expand(20, 64))


def test_what_an_adapter_trains_with_is_what_its_merge_computes() -> None:
    adapted = AdaptedLinear(layer(IntGroupFormat()))
    adapter = QALoraAdapter.from_layer(adapted.base, AdapterConfig(method="qalora", rank=2))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.02)
    adapted.add("default", adapter)
    compute_with(adapted, "q8")
    merged = merge(adapted).layer
    assert merged.activations == "q8"
    x = torch.randn(20, 64)
    trained, computed = adapted(x.requires_grad_(True)), merged(x.detach())
    assert torch.equal(trained, computed)


def test_weights_that_are_no_integers_meet_their_inputs_as_they_are() -> None:
    formats = CodebookFormat(), IntGroupFormat(group_size=16)
    for weight_format in formats:
        frozen = layer(weight_format)
        x = torch.randn(3, 64)
        exact = frozen(x)
        compute_with(frozen, "q8_token")
        assert torch.equal(frozen(x), exact)
    with pytest.raises(GraftError, match="--activations q8_token is for weights that are integers"):
        check_activations("q8_token", formats)
    check_activations("q8_token", [IntGroupFormat()])
    check_activations(None, formats)
