from __future__ import annotations

import copy

import pytest
import torch

from graft.formats.dense import DenseFormat
from graft.formats.int_group import IntGroupFormat
from graft.formats.registry import make_format
from graft.layers.frozen import FrozenLinear


def frozen(weight_format, out_features=6, in_features=44, bias=True) -> FrozenLinear:
    packed = weight_format.pack(torch.randn(out_features, in_features))
    offset = torch.randn(out_features) if bias else None
    return FrozenLinear(in_features, out_features, weight_format, packed, offset)


@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_the_product_plus_bias(weight_format, bias: bool) -> None:
    layer = frozen(weight_format, bias=bias)
    x = torch.randn(2, 3, 44)
    expected = x.double() @ layer.dense_weight().double().T
    if bias:
        expected = expected + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-4)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_packed_tensors_are_frozen_parameters(weight_format) -> None:
    layer = frozen(weight_format)
    names = set(weight_format.storage(6, 44))
    assert set(layer.packed) == names
    assert {name for name, _ in layer.named_parameters()} == names | {"bias"}
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert not list(layer.buffers())
    assert all(parameter.dim() > 0 for parameter in layer.parameters())
    sizes = (t.numel() * t.element_size() for t in layer.packed.values())
    assert layer.storage_bytes == sum(sizes)


def test_packed_tensors_are_not_copied(weight_format) -> None:
    packed = weight_format.pack(torch.randn(6, 44))
    layer = FrozenLinear(44, 6, weight_format, packed)
    for name, tensor in packed.items():
        assert layer.packed[name].data_ptr() == tensor.data_ptr()


def test_state_dict_round_trip(weight_format) -> None:
    layer, other = frozen(weight_format), frozen(weight_format)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 44)
    assert torch.equal(layer(x), other(x))


def test_wrong_shapes_names_and_dtypes_are_refused(weight_format) -> None:
    packed = weight_format.pack(torch.randn(6, 44))
    first = next(iter(packed))
    without = {name: tensor for name, tensor in packed.items() if name != first}
    for wrong in (
        without,
        packed | {"extra": torch.zeros(1)},
        packed | {first: packed[first][:-1]},
        packed | {first: packed[first].to(torch.float64)},
    ):
        with pytest.raises(ValueError, match=rf"packed tensors of {weight_format.name} .*expected"):
            FrozenLinear(44, 6, weight_format, wrong)
    with pytest.raises(ValueError, match="expected"):
        FrozenLinear(45 + 128, 6, weight_format, packed)


def test_linear_with_other_tensors_leaves_its_own(weight_format) -> None:
    layer = frozen(weight_format)
    other = weight_format.pack(torch.randn(6, 44))
    kept = copy.deepcopy(layer.state_dict())
    x = torch.randn(3, 44)
    expected = x.double() @ layer.dense_weight(packed=other).double().T + layer.bias.double()
    torch.testing.assert_close(layer.linear(x, other).double(), expected, rtol=1e-5, atol=1e-4)
    assert all(torch.equal(value, kept[name]) for name, value in layer.state_dict().items())


def test_replaced_keeps_shape_bias_and_transposition() -> None:
    dense = DenseFormat()
    packed = dense.pack(torch.randn(6, 44))
    layer = FrozenLinear(44, 6, dense, packed, torch.randn(6), transposed=True)
    target = IntGroupFormat(bits=3)
    new = layer.replaced(target, target.pack(layer.dense_weight()))
    assert (new.in_features, new.out_features, new.transposed) == (44, 6, True)
    assert torch.equal(new.bias, layer.bias)
    assert new.weight_format == target
    assert layer.weight_format == dense


def test_gradients_reach_the_input(weight_format) -> None:
    layer = frozen(weight_format)
    x = torch.randn(3, 44, requires_grad=True)
    layer(x).sum().backward()
    expected = layer.dense_weight().double().sum(0).expand(3, 44)
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=1e-4)
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_on_meta_nothing_is_allocated(weight_format) -> None:
    specs = weight_format.storage(6, 44)
    packed = {name: spec.empty("meta") for name, spec in specs.items()}
    layer = FrozenLinear(44, 6, weight_format, packed)
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert layer(torch.empty(2, 44, device="meta")).shape == (2, 6)


def test_print_shows_format_and_options() -> None:
    layer = frozen(make_format("int", {"bits": 3, "group_size": 8}))
    assert "int(bits=3, group_size=8, statistics=float16)" in repr(layer)


def test_the_kernels_weight_is_made_once_and_anew_for_another_parameter_or_format() -> None:
    layer, x = frozen(make_format("int"), bias=False), torch.randn(3, 44)
    weight, y = layer.kernel_weight(), layer(x)
    assert layer.kernel_weight() is weight
    layer.scales = torch.nn.Parameter(2 * layer.scales, requires_grad=False)
    replaced = layer.kernel_weight()
    assert replaced is not weight and replaced.tensors[2] is layer.scales
    assert not torch.equal(layer(x), y)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state | {"scales": state["scales"] / 2}, assign=True)
    assert layer.kernel_weight() is not replaced
    assert torch.equal(layer(x), y)
    layer.weight_format = make_format("int", {"bits": 8})
    assert layer.kernel_weight().layout.bits == 8


def test_a_weight_that_is_computed_from_the_packed_tensors_is_not_held() -> None:
    layer, x = frozen(make_format("latent", {"dtype": "float32"}), bias=False), torch.randn(3, 44)
    y = layer(x)
    layer.weight.data.mul_(-1)  # in place
    assert not torch.equal(layer(x), y)
