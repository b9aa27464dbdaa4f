"""Every row of the table of families names what there is; decoder layers are found by name."""

from __future__ import annotations

import importlib

import gguf
import pytest
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from graft.formats.registry import make_format
from graft.model.decoder_layers import by_decoder_layer, decoder_layer_of
from graft.model.families import FAMILIES, Architecture, Family, exported, family_of
from graft.model.running.pointwise import own_norms


@pytest.mark.parametrize("row", FAMILIES.values(), ids=list(FAMILIES))
def test_a_row_names_classes_of_its_family(row: Family) -> None:
    config = CONFIG_MAPPING[row.model_type]
    kind = AutoModelForCausalLM._model_mapping[config]
    module = importlib.import_module(kind.__module__)
    for name in filter(None, (row.norm, row.gate, row.attention, row.decoder)):
        assert isinstance(getattr(module, name), type)
    assert row.decoder in ("", kind.__name__)
    if row.gguf is not None:
        assert row.gguf.architecture in gguf.MODEL_ARCH_NAMES.values()
        assert set(row.gguf.bias_settings) <= set(config().to_dict())


def test_one_family_reads_each_architecture() -> None:
    read = [row.gguf.architecture for row in FAMILIES.values() if row.gguf and row.gguf.read]
    assert len(set(read)) == len(read)


def test_an_unknown_family_is_left_to_transformers() -> None:
    assert family_of(CONFIG_MAPPING["opt"]()) == Family(model_type="opt")


def test_a_new_family_is_one_row(load, monkeypatch) -> None:
    model = load("gemma").model
    assert own_norms(model) == []
    row = Family(model_type="gemma", norm="GemmaRMSNorm")
    monkeypatch.setitem(FAMILIES, "gemma", row)
    assert family_of(model.config) is row
    assert len(own_norms(model)) == 5


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3", "model.layers.3"),
        ("model.layers.3.mlp.experts.12.up_proj", "model.layers.3"),
        ("transformer.h.0.attn.c_attn", "transformer.h.0"),
        ("lm_head", None),
        ("model.layers", None),
        ("model.norm2", None),
        ("", None),
    ],
)
def test_the_decoder_layer_of_a_name(name, layer) -> None:
    assert decoder_layer_of(name) == layer


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_outside_are_groups_by_themselves(family, load) -> None:
    model = load(family, weight_format=make_format("int")).model
    names = [name for name, _ in model.named_modules() if name.endswith(("proj", "head"))]
    grouped = by_decoder_layer(names)
    assert [len(inside) for inside in grouped.values()][-1] == 1
    assert list(grouped)[-1] == "lm_head"
    assert sum(grouped.values(), []) == names


@pytest.mark.parametrize("target", ["gguf", "mlx", "graph"])
def test_what_a_target_computes_for_a_family_is_in_its_row(target, monkeypatch) -> None:
    known = exported(target)
    assert list(known) == [name for name, row in FAMILIES.items() if target in row.exports]
    assert target != "gguf" or all(FAMILIES[name].gguf for name in known)
    assert target != "mlx" or all(FAMILIES[name].in_mlx for name in known)
    for name, architecture in known.items():
        config = CONFIG_MAPPING[name]()
        assert all(hasattr(config, setting) for setting in architecture.settings)
    monkeypatch.setitem(FAMILIES, "toy", Family(model_type="toy", exports={target: Architecture()}))
    assert "toy" in exported(target)
