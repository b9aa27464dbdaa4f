"""Factors over a whole model: each layer on the factored ones before it."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from graft.calibrate.factoring import factor_model
from graft.calibrate.hessian import HessianSum
from graft.calibrate.low_rank import spectrum
from graft.errors import GraftError
from graft.layers.factored import Factored
from graft.model.targets import select_targets


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def batches() -> list[torch.Tensor]:
    return [torch.randint(64, (1, 40)) for _ in range(4)]


def inputs_of(model, name: str, batches) -> HessianSum:
    layer = model.get_submodule(name)
    found = HessianSum(layer.in_features)
    hook = layer.register_forward_pre_hook(lambda _, args: found.add(args[0]))
    for batch in batches:
        model(input_ids=batch)
    hook.remove()
    return found


def test_a_layer_is_factored_on_the_inputs_behind_the_factored_ones(model, batches) -> None:
    names = select_targets(model, ())
    wanted = copy.deepcopy(model)
    found = factor_model(model, names, lambda _: 5, batches)
    # By hand: decoder layer after decoder layer, the inputs of one taken before any of it moves.
    for index in range(3):
        inside = [name for name in names if f".{index}." in name]
        sums = {name: inputs_of(wanted, name, batches) for name in inside}
        for name in inside:
            layer = wanted.get_submodule(name)
            down, up = spectrum(layer.weight, sums[name].value, 0.01).factors(5)
            layer.weight.copy_(up.float() @ down.float())
            made = model.get_submodule(name)
            assert isinstance(made, Factored) and found[name].rank == 5
            product = made.up.weight @ made.down.weight
            torch.testing.assert_close(product, layer.weight, rtol=1e-3, atol=1e-4)


def test_errors_are_reported_and_inputs_lower_that_of_the_outputs(model, batches) -> None:
    before, names = copy.deepcopy(model), select_targets(model, ())
    plain_model = copy.deepcopy(model)
    plain = factor_model(plain_model, names, lambda _: 5)
    aware = factor_model(model, names, lambda _: 5, batches)
    for name in names:
        weight = before.get_submodule(name).weight.double()
        values = torch.linalg.svdvals(weight).square()
        expected = (values[5:].sum() / values.sum()).item()
        assert plain[name].weight_error == pytest.approx(expected, rel=1e-4)
        assert aware[name].weight_error >= plain[name].weight_error * (1 - 1e-4)
        assert plain[name].output_error is None and aware[name].output_error is not None
    first = names[0]
    inputs = inputs_of(before, first, batches).value
    weight = before.get_submodule(first).weight.double()

    def error_of(made) -> float:
        layer = made.get_submodule(first)
        lost = weight - layer.up.weight.double() @ layer.down.weight.double()
        size = ((weight @ inputs) * weight).sum()
        return (((lost @ inputs) * lost).sum() / size).item()

    assert aware[first].output_error == pytest.approx(error_of(model), rel=1e-4)
    assert error_of(model) < error_of(plain_model)


def test_what_would_be_no_smaller_stays_whole(model) -> None:
    names = select_targets(model, ())
    kept = copy.deepcopy(model.get_submodule(names[0]).weight)
    found = factor_model(model, names, lambda seen: len(seen.values) // 2)
    whole = [name for name in names if found[name].rank is None]
    # Half of the rank of a square is its size; a wide matrix gets smaller.
    assert whole == [n for n in names if n.endswith(("q_proj", "o_proj"))]
    assert torch.equal(model.get_submodule(names[0]).weight, kept)
    assert found[names[0]].weight_error == 0 and found[names[0]].weights == kept.numel()
    thin = found["model.layers.0.mlp.up_proj"]
    assert thin.weights == 16 * (32 + 48) and thin.rank == 16


def test_factors_are_rounded_to_the_dtype_that_they_are_stored_in(model) -> None:
    names = select_targets(model, ())
    factor_model(model, names, lambda _: 5, dtype=torch.bfloat16)
    weight = model.get_submodule(names[0]).down.weight
    assert weight.dtype == torch.float32 and torch.equal(weight, weight.bfloat16().float())


def test_inputs_that_are_not_finite_name_the_layer(model, batches) -> None:
    model.get_submodule("model.layers.1.input_layernorm").weight.fill_(torch.nan)
    with pytest.raises(GraftError, match=r"model\.layers\.1\.self_attn\.q_proj: .*finite"):
        factor_model(model, select_targets(model, ()), lambda _: 5, batches)
