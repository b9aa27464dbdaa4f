"""Training on a base whose head is its own, though its settings tie it to the embedding."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import graft
from graft.api.events import Events
from graft.api.run.folder import read_run_config

IDS = torch.arange(40).reshape(2, 20) + 1


class Heard(Events):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


@pytest.fixture(scope="module")
def base(tiny_base, tmp_path_factory) -> Path:
    folder = Path(shutil.copytree(tiny_base, tmp_path_factory.mktemp("own") / "base"))
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].roll(1, 0)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def trained(base: Path, rows: Path, out: Path, method: str) -> list[str]:
    heard = Heard()
    config = graft.TrainConfig(
        model=str(base), data=str(rows), out=str(out), method=method, rank=2, steps=2,
        batch_size=2, device="cpu", dtype="float32",
    )  # fmt: skip
    graft.finetune(config, heard)
    return heard.notes


@pytest.mark.parametrize("method", ["lora", "qalora"])
def test_a_run_keeps_the_head_to_its_export(method, base, rows, tmp_path) -> None:
    run = tmp_path / "run"
    notes = trained(base, rows, run, method)
    assert sum("lm_head.weight: config.json ties it" in note for note in notes) == 1
    model, _ = graft.load(run)
    head = load_file(base / "model.safetensors")["lm_head.weight"]
    assert torch.equal(model.get_output_embeddings().weight, head)
    graft.export_model(run, "hf", tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)
    graft.merge(run, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


def test_a_run_of_an_earlier_version_stays_as_it_was_trained(base, rows, tmp_path) -> None:
    run = tmp_path / "run"
    trained(base, rows, run, "lora")
    reference = json.loads((run / "base.json").read_text())
    assert reference.pop("parted") is True
    (run / "base.json").write_text(json.dumps(reference))
    model, _ = graft.load(run)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    graft.finetune(dataclasses.replace(read_run_config(run), resume=True, steps=3))
    assert json.loads((run / "base.json").read_text()) == reference
    model, _ = graft.load(run)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_run_goes_on_and_comes_back_as_an_adapter(base, rows, tmp_path) -> None:
    run = tmp_path / "run"
    trained(base, rows, run, "lora")
    graft.finetune(dataclasses.replace(read_run_config(run), resume=True, steps=3))
    assert json.loads((run / "base.json").read_text())["parted"] is True
    graft.export_model(run, "peft", tmp_path / "peft")
    graft.adopt(tmp_path / "peft", tmp_path / "adopted", model=str(base))
    assert json.loads((tmp_path / "adopted" / "base.json").read_text())["parted"] is True
    expected = logits(graft.load(run)[0])
    assert torch.equal(logits(graft.load(tmp_path / "adopted")[0]), expected)
