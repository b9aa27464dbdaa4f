"""Models with low-rank factors: saved, loaded, chosen by name, multiplied out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from graft.calibrate.factoring import factor_model
from graft.errors import GraftError
from graft.formats.registry import make_format
from graft.layers.factored import Factored, factored_layers
from graft.layers.frozen import FrozenLinear
from graft.model.factors import factor_ranks, multiply_factors, product_of
from graft.model.load import LoadedModel, load_model
from graft.model.running.decode import why_not_native
from graft.model.save import save_model, save_plain_model
from graft.model.saving import saved_whole
from graft.model.subject import open_subject
from graft.model.targets import freeze_layers, linear_layers, select_targets
from graft.model.trained import select_trained

FAMILIES = ["llama", "llama-tied", "qwen2", "gpt2"]


@pytest.fixture
def compressed(load):
    """A function of a family that returns its model with factors of rank 9."""

    def of(family: str) -> LoadedModel:
        loaded = load(family)
        names = select_targets(loaded.model, ())
        factor_model(loaded.model, names, lambda _: 9)
        return loaded

    return of


def quantise(loaded: LoadedModel) -> None:
    names = list(linear_layers(loaded.model))
    freeze_layers(loaded.model, names)
    weight_format = make_format("int", {"bits": 4})
    for name in names:
        layer = loaded.model.get_submodule(name)
        packed = weight_format.pack(layer.dense_weight())
        parent, _, child = name.rpartition(".")
        setattr(loaded.model.get_submodule(parent), child, layer.replaced(weight_format, packed))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads_as_the_same_one(family, packed, compressed, logits, tmp_path) -> None:
    loaded = compressed(family)
    if packed:
        quantise(loaded)
    save_model(loaded, tmp_path / "saved", None if packed else "exact")
    again = load_model(str(tmp_path / "saved"), dtype="float32", device="cpu")
    assert factor_ranks(again.model) == factor_ranks(loaded.model)
    assert torch.equal(logits(again.model), logits(loaded.model))
    said = json.loads((tmp_path / "saved" / "graft.json").read_text())
    assert said["factors"] == dict.fromkeys(factor_ranks(loaded.model), 9)
    with pytest.raises(ValueError, match="quant_method"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    ("factors", "says"),
    [
        ({"model.layers.0.mlp.up": 9}, "no linear layer"),
        ({"model.layers.0.mlp.up_proj": 81}, "which no factors of it have"),
        ({"model.layers.0.mlp.up_proj": "9"}, "which no factors of it have"),
        ({"model.layers.0.mlp.up_proj": True}, "which no factors of it have"),
        ({"model.layers.0.mlp.up_proj": 8}, "config.json makes it"),
        ({"model.layers.0.mlp.up_proj": 9}, "up_proj.weight"),
        (3, "factors"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(factors, says, compressed, tmp_path) -> None:
    loaded = compressed("llama")
    save_model(loaded, tmp_path / "saved")
    file = tmp_path / "saved" / "graft.json"
    said = json.loads(file.read_text())
    said["factors"] = factors
    file.write_text(json.dumps(said))
    with pytest.raises(GraftError, match=says):
        load_model(str(tmp_path / "saved"), dtype="float32", device="cpu")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_products_are_a_plain_model(family, packed, compressed, logits, tmp_path) -> None:
    loaded = compressed(family)
    if packed:
        quantise(loaded)
    before = logits(loaded.model)
    ranks = multiply_factors(loaded.model)
    assert set(ranks.values()) == {9} and not factor_ranks(loaded.model)
    assert not any(True for _ in factored_layers(loaded.model))
    torch.testing.assert_close(logits(loaded.model), before, rtol=1e-4, atol=1e-4)
    save_plain_model(loaded, tmp_path / "plain", torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits(plain.eval()), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_save_pretrained_writes_the_products(family, compressed, logits, tmp_path: Path) -> None:
    loaded = compressed(family)
    before = logits(loaded.model)
    saved_whole(loaded.model).save_pretrained(tmp_path / "whole")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(plain.eval()), before, rtol=1e-4, atol=1e-4)


def test_the_product_is_that_of_the_factors(compressed) -> None:
    name, layer = next(factored_layers(compressed("gpt2").model))
    assert name.endswith("c_attn") and layer.transposed
    expected = layer.up.weight.double() @ layer.down.weight.double()
    torch.testing.assert_close(product_of(layer).double(), expected, rtol=1e-6, atol=1e-7)
    assert product_of(layer).shape == (240, 80)


def test_a_factored_layer_is_chosen_by_its_name_or_that_of_a_factor(compressed) -> None:
    model = compressed("llama").model
    whole = [n for n in linear_layers(model) if ".0.self_attn.q_proj." in n]
    assert len(whole) == 2
    assert select_targets(model, ["model.layers.0.self_attn.q_proj"]) == whole
    assert select_targets(model, ["q_proj.up"]) == [
        f"model.layers.{number}.self_attn.q_proj.up" for number in (0, 1)
    ]
    assert select_targets(model, [r".*\.0\.self_attn\.q_proj"]) == whole
    factors = [name for name, _ in model.named_parameters() if ".down." in name or ".up." in name]
    assert select_trained(model, ["factors"]) == factors


def test_the_native_decoder_steps_aside(compressed) -> None:
    reason = why_not_native(compressed("llama").model, 16)
    assert reason is not None and ("Factored" in reason or "unavailable" in reason)


def test_biases_stay_with_the_second_factor(load, compressed) -> None:
    before, after = load("qwen2").model, compressed("qwen2").model
    layer = after.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(layer, Factored) and isinstance(layer.up, nn.Linear)
    assert layer.down.bias is None
    assert torch.equal(layer.up.bias, before.get_parameter("model.layers.0.self_attn.q_proj.bias"))
    multiply_factors(after)
    whole = after.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(whole, FrozenLinear) and torch.equal(whole.bias, layer.up.bias)


def test_a_bias_of_the_first_factor_goes_through_the_second(compressed, logits) -> None:
    model = compressed("qwen2").model
    for name in ("self_attn.q_proj", "mlp.up_proj"):  # with a bias of its own, and without
        down = model.get_submodule(f"model.layers.0.{name}.down")
        down.bias = nn.Parameter(torch.randn(9), requires_grad=False)
    before = logits(model)
    multiply_factors(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_a_subject_knows_the_factors_without_weights(compressed, tmp_path) -> None:
    loaded = compressed("llama")
    save_model(loaded, tmp_path / "saved")
    subject = open_subject(tmp_path / "saved", config_alone=True)
    assert subject.factors == factor_ranks(loaded.model) == factor_ranks(subject.skeleton)
    assert subject.formats == {}
