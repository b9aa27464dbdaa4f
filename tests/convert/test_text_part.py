"""The text part of a model that takes more than text, as a model by itself."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from foreign import foreign_folder, linear_names, nf4_layer, nf4_weight
from safetensors.torch import load_file, save_file
from small_multimodal import multimodal_config, multimodal_model
from transformers import AutoModelForCausalLM

import graft
from graft.cli.main import main
from graft.convert.config import ConvertConfig
from graft.errors import GraftError
from graft.model.text_part import TAKEN

TEXT_PART = ConvertConfig(text_part=True)
WEIGHTS = "model.safetensors"
IDS = torch.arange(24).reshape(1, 24) * 7 % 300 + 3


@pytest.fixture
def folder_of(tiny_base, tmp_path):
    """A function of a family that returns the folder of a tiny model, and the model."""

    def make(family: str):
        model = multimodal_model(family)
        model.save_pretrained(tmp_path / "whole")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_base / file, tmp_path / "whole" / file)
        return tmp_path / "whole", model

    return make


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", sorted(TAKEN))
def test_its_logits_are_those_of_the_whole_model(family, folder_of, tmp_path) -> None:
    folder, model = folder_of(family)
    report = graft.convert_model(folder, tmp_path / "text", config=TEXT_PART)
    assert any(f"the text part of a {family}, as a " in note for note in report.notes)
    assert torch.equal(logits(graft.load(tmp_path / "text", dtype="float32")[0]), logits(model))


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl", "llava"])
def test_transformers_reads_what_was_written(family, folder_of, tmp_path) -> None:
    folder, model = folder_of(family)
    graft.convert_model(folder, tmp_path / "text", config=TEXT_PART)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "text", dtype=torch.float32).eval()
    assert torch.equal(logits(theirs), logits(model))


def test_names_of_today_and_of_before(folder_of, tmp_path) -> None:
    folder, model = folder_of("gemma3")
    tensors = load_file(folder / WEIGHTS)
    assert any(name.startswith("language_model.model.") for name in tensors)
    today = {
        name.replace("language_model.model.", "model.language_model."): tensor.clone()
        for name, tensor in tensors.items()
    }
    save_file(today, folder / WEIGHTS, metadata={"format": "pt"})
    graft.convert_model(folder, tmp_path / "text", config=TEXT_PART)
    assert torch.equal(logits(graft.load(tmp_path / "text", dtype="float32")[0]), logits(model))


def test_a_pickled_folder_with_a_head_of_its_own(folder_of, tmp_path) -> None:
    folder, model = folder_of("gemma3")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().roll(1, 0))
    (folder / WEIGHTS).unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    report = graft.convert_model(folder, tmp_path / "text", config=TEXT_PART)
    assert any("lm_head.weight" in note for note in report.notes)
    assert torch.equal(logits(graft.load(tmp_path / "text", dtype="float32")[0]), logits(model))


def test_what_ends_a_text_comes_from_the_whole_model(folder_of, tmp_path) -> None:
    folder, _ = folder_of("gemma3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [1, 106]}))
    graft.convert_model(folder, tmp_path / "text", config=TEXT_PART)
    written = json.loads((tmp_path / "text" / "config.json").read_text())
    assert written["eos_token_id"] == [1, 106] and written["model_type"] == "gemma3_text"


COMMANDS = [
    "train --model {} --data {rows} --out {out} --export gguf",
    "plan --model {}",
    "data {} {rows}",
    "eval {} --data {rows}",
    "export {} --to gguf --out {out}",
    "quantize --model {} --format nf4 --out {out}",
    "generate {} --prompt a",
    "convert {} --out {out}",
]


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl"])
def test_every_command_names_the_way_to_the_text_part(
    family, folder_of, rows, tmp_path, capsys
) -> None:
    folder, _ = folder_of(family)
    for command in COMMANDS:
        capsys.readouterr()
        assert main(command.format(folder, rows=rows, out=tmp_path / "out").split()) == 1
        what, way = capsys.readouterr().err.strip().splitlines()
        assert f"{folder} is a {family}, which takes more than text" in what
        assert way.endswith(f"graft convert {folder} --text-part --out NEW_FOLDER")
        assert not (tmp_path / "out").exists()


def test_a_quantised_folder(folder_of, tmp_path) -> None:
    folder, model = folder_of("mistral3")
    inside = "language_model.model.layers."
    names = [n for n in linear_names(load_file(folder / WEIGHTS)) if n.startswith(inside)]
    assert len(names) == 14
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    quantised = foreign_folder(folder, tmp_path / "quantised", settings, nf4_layer, names)
    report = graft.convert_model(quantised, tmp_path / "text", config=TEXT_PART)
    assert report.layers == {"nf4": 14}
    stored = load_file(quantised / WEIGHTS)
    with torch.no_grad():
        for name in names:
            weight = model.get_parameter(f"model.{name.replace('model.', '', 1)}.weight")
            weight.copy_(nf4_weight(stored, name, tuple(weight.shape)))
    found = logits(graft.load(tmp_path / "text", dtype="float32")[0])
    torch.testing.assert_close(found, logits(model), rtol=1e-5, atol=1e-5)


def test_what_is_not_taken_is_refused_by_name(tiny_base, folder_of, tmp_path) -> None:
    with pytest.raises(GraftError, match="is a llama, which takes text alone; leave out"):
        graft.convert_model(tiny_base, tmp_path / "text", config=TEXT_PART)
    folder, _ = folder_of("gemma3")
    config = multimodal_config("aya_vision").to_dict()  # which leaves out the scale of its logits
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(GraftError, match="is a aya_vision, whose text part graft does not take"):
        graft.convert_model(folder, tmp_path / "text", config=TEXT_PART)
    with pytest.raises(GraftError, match="Its text part is not taken either"):
        graft.load(folder)
