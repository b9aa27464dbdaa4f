"""Old names of tensors, and tensors that the model has no place for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import model_of
from transformers import AutoModelForCausalLM

from graft.errors import GraftError
from graft.model.load import load_model
from graft.model.names import names_in

WEIGHTS = "model.safetensors"


@pytest.fixture
def with_more(copied):
    """A function of tensors that returns a Llama's folder which holds them too."""

    def make(**more: torch.Tensor) -> Path:
        folder = copied("llama")
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
        save_file(tensors | more, folder / WEIGHTS, metadata={"format": "pt"})
        return folder

    return make


def test_names_that_a_family_had_before(tmp_path, tiny_base, logits) -> None:
    model = model_of("gpt_neox", vocab_size=320)
    model.save_pretrained(tmp_path)
    assert "embed_out.weight" in load_file(tmp_path / WEIGHTS)  # the module is lm_head
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((tiny_base / file).read_bytes())
    loaded = load_model(str(tmp_path), dtype="float32", device="cpu")
    assert torch.equal(logits(loaded.model), logits(model)) and not loaded.notes


def test_the_parts_of_a_layer_go_where_its_weight_would() -> None:
    names = names_in(model_of("gpt_neox"), ["embed_out.qweight", "layers.0.mlp.dense_h_to_4h.g.x"])
    assert names == {
        "embed_out.qweight": "lm_head.qweight",
        "layers.0.mlp.dense_h_to_4h.g.x": "gpt_neox.layers.0.mlp.dense_h_to_4h.g.x",
    }


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.2.input_layernorm.weight",
        "model.embed_positions.weight",
        "lm_head.bias",
    ],
)
def test_a_tensor_more_inside_the_model_is_refused_unless_it_is_zero(name, with_more) -> None:
    with pytest.raises(GraftError, match=f"{name} is not zero, and the model of config.json has"):
        load_model(str(with_more(**{name: torch.ones(80)})), device="cpu")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.0.self_attn.q_proj.bias", 0),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", 1),
        ("v_head.summary.weight", 1),
    ],
)
def test_a_tensor_that_changes_nothing_is_told(name, value, with_more, logits, load) -> None:
    folder = with_more(**{name: torch.full((8,), float(value))})
    loaded = load_model(str(folder), dtype="float32", device="cpu")
    assert loaded.notes == (f"left out, because 1 tensor has no place in the model: {name}",)
    assert torch.equal(logits(loaded.model), logits(load("llama").model))
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(logits(loaded.model), logits(theirs))


def test_a_tensor_under_two_names(with_more, load, logits) -> None:
    norm = load("llama").model.model.norm.weight.clone()
    loaded = load_model(str(with_more(**{"norm.weight": norm})), dtype="float32", device="cpu")
    assert torch.equal(logits(loaded.model), logits(load("llama").model))


def test_two_tensors_for_one_place_are_refused(with_more) -> None:
    with pytest.raises(GraftError, match="'norm.weight' are both 'model.norm.weight'"):
        load_model(str(with_more(**{"norm.weight": torch.ones(80)})), device="cpu")
