"""A run whose adapter starts as LoftQ: what it starts from, and where its adapter may go."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import graft
from graft.adapters.attach import adapted_layers
from graft.errors import GraftError
from graft.model.adapter_files import load_adapter
from graft.model.load import load_model
from graft.model.targets import freeze_layers, linear_layers


def test_a_run_that_starts_as_loftq(tiny_base, rows, tmp_path):
    run = tmp_path / "run"
    common = {"model": str(tiny_base), "data": str(rows), "max_length": 48, "steps": 3}
    common |= {"method": "qlora", "rank": 8, "batch_size": 4, "learning_rate": 1e-2}
    report = graft.finetune(graft.TrainConfig(**common, init="loftq", out=str(run)))
    assert report.init == "loftq"
    assert "init: loftq" in (run / "config.yaml").read_text()
    dense = AutoModelForCausalLM.from_pretrained(tiny_base)

    started = load_model(str(run / "base"), device="cpu")
    load_adapter(started.model, run / "start")
    lost = rounded = 0.0
    for name, layer in adapted_layers(started.model):
        weight = dense.get_submodule(name).weight.double()
        lost += (layer.effective_weight() - weight).square().sum().item()
        rounded += (layer.base.dense_weight().double() - weight).square().sum().item()
    assert lost < 0.7 * rounded

    trained, _ = graft.load(run)
    graft.merge(run, tmp_path / "merged")
    graft.merge(run, tmp_path / "original", into="original")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "original")
    for name, layer in adapted_layers(trained):
        end = layer.adapter("default").delta(layer.base)
        start = started.model.get_submodule(name).adapter("default").delta(layer.base)
        assert (end - start).abs().max() > 1e-3
        close = {"rtol": 0, "atol": 1e-6}
        expected = layer.base.dense_weight().double() + end
        torch.testing.assert_close(merged.get_submodule(name).weight.double(), expected, **close)
        expected = dense.get_submodule(name).weight.double() + end - start
        torch.testing.assert_close(original.get_submodule(name).weight.double(), expected, **close)

    exported = graft.export_model(run, "peft", tmp_path / "peft")
    assert "not on the original" in exported.notes[0]
    assert str(run / "base") in exported.notes[0]
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(run / "base")
    again = load_model(str(run / "base"))
    load_adapter(again.model, tmp_path / "peft")
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(again.model(input_ids=ids).logits, trained(input_ids=ids).logits)
    wrong = load_model(str(tiny_base))
    freeze_layers(wrong.model, list(linear_layers(wrong.model)))
    with pytest.raises(
        GraftError, match=r"is dense, and this adapter began as a part of the quantised weights"
    ):
        load_adapter(wrong.model, tmp_path / "peft")
