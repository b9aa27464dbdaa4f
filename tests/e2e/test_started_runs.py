"""Runs whose adapters begin as a part of the weights, or with ranks of their own."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import graft
from graft.adapters.attach import adapted_layers
from graft.api.events import Events
from graft.model.adapter_files import load_adapter
from graft.model.load import load_model
from graft.model.targets import freeze_layers, linear_layers


class Notes(Events):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def train(model, rows, out, **changes) -> tuple[graft.RunReport, list[str]]:
    events = Notes()
    common = {"model": str(model), "data": str(rows), "eval_data": str(rows), "max_length": 48}
    common |= {"steps": 3, "batch_size": 4, "learning_rate": 1e-2, "rank": 8}
    report = graft.finetune(graft.TrainConfig(**common | changes, out=str(out)), events)
    return report, events.notes


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(40).reshape(2, 20)).logits


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_what_a_dense_run_began_with_is_no_part_of_its_adapter(tiny_base, rows, tmp_path, method):
    run = tmp_path / "run"
    report, notes = train(tiny_base, rows, run, method=method, init="pissa")
    assert any(note.startswith("pissa: the adapters begin with") for note in notes)
    assert report.init == "pissa"
    base = graft.evaluate_model(tiny_base, str(rows))
    assert report.eval_loss_before == pytest.approx(base["loss"], rel=1e-5)
    trained = graft.evaluate_model(run, str(rows))
    assert report.eval_loss == pytest.approx(trained["loss"], rel=1e-5)
    assert report.eval_loss < report.eval_loss_before - 0.01

    # The run's adapter is an ordinary one of the model that it names.
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 16
    assert config["base_model_name_or_path"] == str(tiny_base)
    assert not (run / "base").exists()
    model, _ = graft.load(run)
    exported = graft.export_model(run, "peft", tmp_path / "peft")
    assert exported.notes == ()
    again = load_model(str(tiny_base), device="cpu").model
    freeze_layers(again, list(linear_layers(again)))
    load_adapter(again, tmp_path / "peft")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)

    # Nothing is taken out of it a second time.
    for into in ("trained", "original"):
        graft.merge(run, tmp_path / into, into=into)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / into)
        torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["olora", "corda"])
def test_on_a_quantised_base_it_is(tiny_base, rows, tmp_path, init):
    run = tmp_path / "run"
    report, _ = train(tiny_base, rows, run, method="qlora", init=init)
    trained = graft.evaluate_model(run, str(rows))
    assert report.eval_loss == pytest.approx(trained["loss"], rel=1e-5)
    started = load_model(str(run / "base"), device="cpu").model
    load_adapter(started, run / "start")
    model, _ = graft.load(run)
    graft.merge(run, tmp_path / "original", into="original")
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "original")
    dense = AutoModelForCausalLM.from_pretrained(tiny_base)
    for name, layer in adapted_layers(model):
        first = started.get_submodule(name)
        weight = dense.get_submodule(name).weight.double()
        lost = (first.effective_weight() - weight).square().mean()
        assert lost < 0.02 * weight.square().mean()
        moved = layer.adapter("default").delta(layer.base) - first.adapter("default").delta(None)
        found = original.get_submodule(name).weight.double()
        torch.testing.assert_close(found, weight + moved, rtol=0, atol=1e-5)
    exported = graft.export_model(run, "peft", tmp_path / "peft")
    assert f"started as {init}" in exported.notes[0]
    assert "No adapter of those can say" in exported.notes[0]
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(run / "base")
    assert config["r"] == 8


def test_ranks_of_their_own(tiny_base, rows, tmp_path):
    run = tmp_path / "run"
    report, notes = train(tiny_base, rows, run, method="lora", init="eva", rank=4, eva_rho=3.0)
    assert any(note.startswith("eva: ranks from ") for note in notes)
    model, _ = graft.load(run)
    adapters = [layer.adapter("default") for _, layer in adapted_layers(model)]
    ranks = [len(adapter.A) for adapter in adapters]
    assert sum(ranks) == 4 * 14
    assert len(set(ranks)) > 1
    assert max(ranks) <= 12
    assert {adapter.scaling for adapter in adapters} == {1.0}
    trained = sum(p.numel() for adapter in adapters for p in adapter.parameters())
    assert report.trainable_parameters == trained
    evaluated = graft.evaluate_model(run, str(rows))
    assert report.eval_loss == pytest.approx(evaluated["loss"], rel=1e-6)


def test_each_says_what_hinders(tiny_base, rows, tmp_path):
    with pytest.raises(graft.GraftError, match="would calibrate it on what a model without"):
        train(tiny_base, rows, tmp_path / "run", method="qlora", init="pissa", solver="gptq")
    train(tiny_base, rows, tmp_path / "quantised", method="qlora", steps=1)
    folder = tmp_path / "quantised" / "base"
    with pytest.raises(graft.GraftError, match="--init pissa rounds the weights itself"):
        train(folder, rows, tmp_path / "run", method="lora", init="pissa")
