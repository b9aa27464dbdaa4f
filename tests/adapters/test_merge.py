from __future__ import annotations

import pytest
import torch

from graft.adapters.adapted import AdaptedLinear
from graft.adapters.affine import AffineAdapter
from graft.adapters.lora import LoraAdapter
from graft.adapters.merge import merge, merge_adapters
from graft.adapters.qalora import QALoraAdapter
from graft.formats.codebook import CodebookFormat
from graft.formats.dense import DenseFormat
from graft.formats.int_group import IntGroupFormat


def adapters_for(weight_format: IntGroupFormat, names: str) -> list:
    group_size = weight_format.group_size
    makers = {
        "qalora": lambda: QALoraAdapter(44, 6, group_size, rank=3),
        "moving": lambda: QALoraAdapter(44, 6, group_size, rank=3, grid_rank=2),
        "affine": lambda: AffineAdapter(6, weight_format.groups(44)),
    }
    return [makers[name]() for name in names.split("+")]


def adapted(base, adapters, randomise) -> AdaptedLinear:
    layer = AdaptedLinear(base)
    for index, adapter in enumerate(adapters):
        layer.add(f"adapter{index}", randomise(adapter))
    return layer


@pytest.mark.parametrize(
    "names", ["qalora", "moving", "affine", "qalora+affine", "affine+qalora", "moving+moving"]
)
@pytest.mark.parametrize("statistics", ["float16", "float32"])
@pytest.mark.parametrize("group_size", [8, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_grid_adapters_merge_bit_for_bit(
    bits, group_size, statistics, names, frozen, randomise
) -> None:
    weight_format = IntGroupFormat(bits=bits, group_size=group_size, statistics=statistics)
    base = frozen(weight_format)
    layer = adapted(base, adapters_for(weight_format, names), randomise)
    x = torch.randn(3, 5, 44)
    before = layer(x)
    result = merge(layer)
    assert result.layer.weight_format == weight_format
    assert torch.equal(result.layer(x), before)
    assert torch.equal(result.layer.dense_weight().double(), layer.effective_weight())
    assert result.error.as_dict() == {"max_abs": 0.0, "relative_to_update": 0.0, "exact": True}
    assert not torch.equal(result.layer(x), base(x))
    assert not any(parameter.requires_grad for parameter in result.layer.parameters())
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("weight_format", [DenseFormat(), CodebookFormat(), IntGroupFormat()])
def test_lora_merges_into_a_dense_layer(weight_format, frozen, randomise) -> None:
    base = frozen(weight_format)
    layer = adapted(base, [LoraAdapter(44, 6, rank=3, bias=True)], randomise)
    result = merge(layer)
    assert result.layer.weight_format == DenseFormat("float32")
    expected = base.dense_weight().double() + layer.adapter("adapter0").delta(base)
    assert torch.equal(result.layer.dense_weight(), expected.float())
    lost = (expected.float().double() - expected).abs().max().item()
    assert result.error.max_abs == lost
    assert result.error.relative_to_update < 1e-5
    x = torch.randn(3, 44)
    torch.testing.assert_close(result.layer(x), layer(x), rtol=1e-5, atol=1e-5)


def test_a_bias_is_made_where_there_was_none(frozen, randomise) -> None:
    base = frozen(DenseFormat(), bias=False)
    adapter = LoraAdapter(44, 6, rank=3, alpha=6.0, bias=True)
    layer = adapted(base, [adapter], randomise)
    merged = merge(layer).layer
    assert torch.equal(merged.bias, adapter.bias * 2)
    assert base.bias is None


def test_merging_leaves_the_bias_of_the_base(frozen, randomise) -> None:
    base = frozen(DenseFormat())
    kept = base.bias.clone()
    layer = adapted(base, [LoraAdapter(44, 6, rank=3, bias=True)], randomise)
    assert not torch.equal(merge(layer).layer.bias, kept)
    assert torch.equal(base.bias, kept)


@pytest.mark.parametrize("target", [IntGroupFormat(), IntGroupFormat(bits=2), CodebookFormat()])
def test_a_target_is_rounded_to_and_the_loss_is_measured(target, frozen, randomise) -> None:
    base = frozen(DenseFormat())
    adapter = LoraAdapter(44, 6, rank=3)
    layer = adapted(base, [adapter], randomise)
    result = merge(layer, target)
    assert result.layer.weight_format == target
    trained = base.dense_weight().double() + adapter.delta(base)
    lost = target.unpack(target.pack(trained.float()), 6, 44, torch.float32).double() - trained
    assert result.error.max_abs == pytest.approx(lost.abs().max().item())
    ratio = lost.square().mean().sqrt() / adapter.delta(base).square().mean().sqrt()
    assert result.error.relative_to_update == pytest.approx(ratio.item())
    assert result.error.relative_to_update > 0.05
    assert not result.error.exact


def test_the_bases_own_format_as_target_stays_exact_for_grid_adapters(frozen, randomise) -> None:
    weight_format = IntGroupFormat(bits=3, group_size=8)
    layer = adapted(frozen(weight_format), adapters_for(weight_format, "qalora"), randomise)
    assert merge(layer, IntGroupFormat(bits=3, group_size=8)).error.exact
    other = merge(layer, IntGroupFormat(bits=3, group_size=16)).error
    assert not other.exact
    assert other.relative_to_update > 0


def test_a_lora_on_a_grid_is_rounded_again_when_its_format_is_the_target(frozen, randomise) -> None:
    weight_format = IntGroupFormat(group_size=8)
    layer = adapted(frozen(weight_format), [LoraAdapter(44, 6, rank=3)], randomise)
    result = merge(layer, weight_format)
    assert result.layer.weight_format == weight_format
    assert result.error.relative_to_update > 0.05


def test_grid_and_additive_adapters_together_merge_densely(frozen, randomise) -> None:
    weight_format = IntGroupFormat(group_size=8)
    adapters = [*adapters_for(weight_format, "affine"), LoraAdapter(44, 6, rank=3)]
    layer = adapted(frozen(weight_format), adapters, randomise)
    result = merge(layer)
    assert result.layer.weight_format == DenseFormat("float32")
    x = torch.randn(3, 44)
    torch.testing.assert_close(result.layer(x), layer(x), rtol=1e-5, atol=1e-5)
    assert result.error.relative_to_update < 1e-5


def test_only_active_adapters_are_merged(frozen, randomise) -> None:
    weight_format = IntGroupFormat(group_size=8)
    base = frozen(weight_format)
    layer = adapted(base, adapters_for(weight_format, "qalora+affine"), randomise)
    layer.active = ()
    result = merge(layer)
    x = torch.randn(3, 44)
    assert torch.equal(result.layer(x), base(x))
    assert result.error.exact
    assert result.error.relative_to_update == 0
    layer.active = ("adapter1",)
    assert torch.equal(merge(layer).layer(x), layer(x))


def test_a_lossy_target_without_an_update_has_an_infinite_relative_error(frozen) -> None:
    result = merge(AdaptedLinear(frozen(DenseFormat())), CodebookFormat())
    assert result.error.relative_to_update == float("inf")
    assert not result.error.exact


def test_a_model_is_merged_in_place_layer_by_layer(frozen, randomise) -> None:
    weight_format = IntGroupFormat(group_size=8)
    model = torch.nn.Sequential(
        adapted(frozen(weight_format, 44, 44), [QALoraAdapter(44, 44, 8, rank=2)], randomise),
        torch.nn.Tanh(),
        adapted(frozen(weight_format), adapters_for(weight_format, "affine"), randomise),
    ).eval()
    x = torch.randn(3, 44)
    before = model(x)
    seen: list[tuple[int, int]] = []
    errors = merge_adapters(model, on_layer=lambda done, total: seen.append((done, total)))
    assert torch.equal(model(x), before)
    assert list(errors) == ["0", "2"]
    assert all(error.exact for error in errors.values())
    assert seen == [(1, 2), (2, 2)]
    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())
    assert not any(module.training for module in model.modules())
