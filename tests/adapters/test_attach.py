from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graft.adapters.adapted import AdaptedLinear
from graft.adapters.attach import (
    activate_adapters,
    adapted_layers,
    adapter_names,
    adapter_parameters,
    attach_adapter,
    frozen_layers,
    remove_adapter,
    replace_module,
)
from graft.adapters.config import AdapterConfig
from graft.errors import GraftError
from graft.formats.codebook import CodebookFormat
from graft.formats.int_group import IntGroupFormat

LAYERS = ["first", "blocks.0.second", "blocks.1.second"]
METHODS = ["lora", "qalora", "affine"]


class Network(nn.Module):
    def __init__(self, frozen, weight_format) -> None:
        super().__init__()
        self.first = frozen(weight_format, 44, 44)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"second": frozen(weight_format, 44, 44)}) for _ in range(2)
        )
        self.norm = nn.LayerNorm(44)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = self.norm(x + block["second"](x))
        return x


@pytest.fixture
def network(frozen) -> Network:
    return Network(frozen, IntGroupFormat(group_size=8)).eval()


def config(method: str, **options) -> AdapterConfig:
    return AdapterConfig(method=method, rank=3, **options)


def attach(network, method: str, name: str, randomise, layers=LAYERS) -> None:
    attach_adapter(network, layers, config(method), name)
    for layer in network.modules():
        if isinstance(layer, AdaptedLinear) and name in layer.adapters:
            randomise(layer.adapter(name))


@pytest.mark.parametrize("method", METHODS)
def test_removing_restores_every_bit_and_the_very_modules(method, network, randomise) -> None:
    x = torch.randn(5, 44)
    before, modules = network(x), dict(network.named_modules())
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    attach(network, method, "default", randomise)
    assert not torch.equal(network(x), before)
    remove_adapter(network, "default")
    assert torch.equal(network(x), before)
    after = dict(network.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[name] is module for name, module in modules.items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_several_adapters_are_switched_by_name(network, randomise) -> None:
    x = torch.randn(5, 44)
    base = network(x)
    alone = {}
    for method in METHODS:
        attach(network, method, method, randomise)
        activate_adapters(network, [method])
        alone[method] = network(x)
    assert adapter_names(network) == METHODS
    for method in METHODS:
        activate_adapters(network, [method])
        assert torch.equal(network(x), alone[method])
    activate_adapters(network, METHODS)
    together = network(x)
    assert all(not torch.equal(together, output) for output in alone.values())
    activate_adapters(network, [])
    assert torch.equal(network(x), base)
    remove_adapter(network, "qalora")
    activate_adapters(network, ["affine"])
    assert torch.equal(network(x), alone["affine"])
    assert adapter_names(network) == ["lora", "affine"]


def test_removing_an_active_adapter_leaves_the_others_active(network, randomise) -> None:
    x = torch.randn(5, 44)
    attach(network, "lora", "one", randomise)
    only_one = network(x)
    attach(network, "affine", "two", randomise)
    remove_adapter(network, "two")
    assert torch.equal(network(x), only_one)


def test_adapters_may_sit_on_different_layers(network, randomise) -> None:
    attach(network, "qalora", "one", randomise, LAYERS[:1])
    attach(network, "lora", "two", randomise, LAYERS[1:])
    assert [name for name, _ in adapted_layers(network)] == LAYERS
    assert dict(frozen_layers(network)).keys() == set(LAYERS)
    assert set(adapter_parameters(network, "one")) == {"first.A", "first.B"}
    activate_adapters(network, ["two"])
    assert network.first.active == ()
    assert network.blocks[0]["second"].active == ("two",)
    remove_adapter(network, "one")
    assert [name for name, _ in adapted_layers(network)] == LAYERS[1:]


def test_only_the_adapter_is_trainable(network) -> None:
    for parameter in network.norm.parameters():
        parameter.requires_grad_(False)
    attach_adapter(network, LAYERS, config("qalora"))
    trainable = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trainable == {
        f"{layer}.adapters.default.{name}" for layer in LAYERS for name in ("A", "B")
    }
    found = adapter_parameters(network, "default")
    assert set(found) == {f"{layer}.{name}" for layer in LAYERS for name in ("A", "B")}


def test_the_same_seed_gives_the_same_adapter(frozen) -> None:
    made = []
    for _ in range(2):
        network = Network(frozen, IntGroupFormat())
        torch.manual_seed(7)
        attach_adapter(network, LAYERS, config("lora"))
        made.append(adapter_parameters(network, "default"))
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_options_reach_the_adapter(network) -> None:
    options = {"alpha": 6.0, "rslora": True, "dropout": 0.25, "adapter_bias": True}
    attach_adapter(network, ["first"], config("lora", **options))
    adapter = network.first.adapter("default")
    assert adapter.scaling == pytest.approx(6 / 3**0.5)
    assert adapter.dropout == 0.25
    assert adapter.bias is not None
    attach_adapter(network, ["first"], config("qalora", alpha=6.0), "other")
    assert network.first.adapter("other").scaling == pytest.approx(6 / 3)


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_is_kept(network, training: bool) -> None:
    network.train(training)
    attach_adapter(network, LAYERS, config("lora", dropout=0.5))
    assert all(module.training == training for module in network.modules())
    remove_adapter(network, "default")
    assert all(module.training == training for module in network.modules())


def test_all_problems_are_told_and_nothing_changes(frozen) -> None:
    network = Network(frozen, CodebookFormat())
    attach_adapter(network, ["blocks.0.second"], config("lora"))
    kept = dict(network.named_modules())
    with pytest.raises(GraftError) as caught:
        attach_adapter(network, ["norm", "first", "blocks.0.second", "nope"], config("qalora"))
    message = str(caught.value)
    assert "cannot attach adapter 'default': 4 problems" in message
    for part in (
        "norm is not a frozen linear layer",
        "nope is not a frozen linear layer",
        "first: method 'qalora' needs weights in the int format, found 'nf4'",
        "--format int",
        "blocks.0.second already has an adapter named 'default'; remove it first",
    ):
        assert part in message
    assert dict(network.named_modules()) == kept


@pytest.mark.parametrize("name", ["", "a.b", "keys"])
def test_a_name_that_cannot_be_a_module_is_refused(name: str, network) -> None:
    kept = dict(network.named_modules())
    with pytest.raises(GraftError, match="cannot be an adapter's name"):
        attach_adapter(network, LAYERS, config("lora"), name)
    assert dict(network.named_modules()) == kept


def test_full_attaches_nothing(network) -> None:
    with pytest.raises(GraftError, match="attaches no adapter|needs weights"):
        attach_adapter(network, LAYERS, config("full"))


def test_unknown_names_are_told(network) -> None:
    attach_adapter(network, LAYERS, config("lora"), "summary")
    with pytest.raises(GraftError, match="'sumary'; did you mean 'summary'"):
        activate_adapters(network, ["sumary"])
    with pytest.raises(GraftError, match="no adapter 'other' to remove"):
        remove_adapter(network, "other")
    with pytest.raises(GraftError, match="already there"):
        network.first.add("summary", network.first.adapter("summary"))


def test_a_module_is_replaced_at_any_depth(network) -> None:
    replace_module(network, "blocks.1.second", nn.Identity())
    assert isinstance(network.blocks[1]["second"], nn.Identity)


@pytest.mark.parametrize("method", METHODS)
def test_an_evaluation_between_two_steps_changes_no_gradient(method, network, randomise) -> None:
    attach(network, method, "default", randomise)
    x, held_out = torch.randn(5, 44), torch.randn(9, 44)

    def gradients() -> list[Tensor]:
        network.train()
        network.zero_grad()
        network(x).square().sum().backward()
        return [p.grad.clone() for p in adapter_parameters(network, "default").values()]

    first = gradients()
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.eval()
    with torch.no_grad():
        network(held_out)
    with torch.inference_mode():
        network(held_out)
    second = gradients()
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
