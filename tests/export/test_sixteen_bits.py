"""An export holds the weights that the files have, whatever this machine computes in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import graft
from graft.api.events import Events
from graft.export.layers import model_ids, stored_dtype
from graft.export.onnx.genai import genai_config, genai_notes
from graft.formats.int_group import IntGroupFormat
from graft.model import devices
from graft.model.load import load_model
from graft.model.tokens import beyond_notes


@pytest.fixture
def half(tiny_base: Path, tmp_path: Path) -> Path:
    """The base in float16, of which bfloat16 would lose three bits."""
    folder = tmp_path / "half"
    shutil.copytree(tiny_base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    return folder


@pytest.fixture(params=[True, False], ids=["bf16-machine", "plain-machine"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "computes_bfloat16", lambda device: request.param)


def test_a_float16_model_is_exported_as_it_is(half: Path, tmp_path: Path, machine: None) -> None:
    graft.export_model(half, "hf", tmp_path / "out")
    source = load_file(half / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in found.items()} == dict.fromkeys(
        source, torch.float16
    )
    assert all(torch.equal(found[name], source[name]) for name in source)


def test_what_is_not_quantised_of_a_float16_model_stays_as_it_is(
    half: Path, tmp_path: Path, machine: None
) -> None:
    graft.quantize(graft.QuantizeConfig(model=str(half), out=str(tmp_path / "out"), format="int"))
    source = load_file(half / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    kept = [name for name in source if name in found]
    assert "model.embed_tokens.weight" in kept
    assert all(torch.equal(found[name], source[name]) for name in kept)


def test_training_tells_what_bfloat16_takes_of_float16(
    half: Path, rows: Path, tmp_path: Path, machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = devices.dtype_note(torch.float16, torch.bfloat16)
    heard: list[str] = []
    events = Events()
    monkeypatch.setattr(events, "note", heard.append)
    config = graft.TrainConfig(
        model=str(half), data=str(rows), out=str(tmp_path / "run"), method="lora", steps=1
    )
    graft.finetune(config, events)
    assert (told in heard) == devices.computes_bfloat16(torch.device("cpu"))


def test_a_float32_tensor_in_a_bfloat16_model_keeps_its_digits(
    half: Path, tmp_path: Path, machine: None
) -> None:
    tensors = load_file(half / "model.safetensors")
    name = "model.norm.weight"
    tensors = {key: tensor.bfloat16() for key, tensor in tensors.items()}
    tensors[name] = 1 + torch.rand(tensors[name].shape) / 7
    save_file(tensors, half / "model.safetensors", {"format": "pt"})
    loaded = load_model(str(half), dtype="stored")
    assert torch.equal(loaded.model.get_parameter(name), tensors[name])
    assert stored_dtype(loaded.model.get_parameter(name), torch.bfloat16) is torch.float32
    embeddings = loaded.model.get_input_embeddings().get_parameter("weight")
    assert stored_dtype(embeddings, torch.bfloat16) is torch.bfloat16
    assert stored_dtype(embeddings.float(), torch.bfloat16) is torch.bfloat16


def test_a_float16_base_of_a_run_is_merged_and_exported_as_it_is(
    half: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "computes_bfloat16", lambda device: True)
    run = tmp_path / "run"
    settings: dict[str, Any] = {"method": "lora", "steps": 1, "batch_size": 2}
    settings["targets"] = ("q_proj",)
    settings |= {"model": str(half), "data": str(rows), "out": str(run)}
    graft.finetune(graft.TrainConfig(**settings))
    graft.export_model(run, "hf", tmp_path / "out")
    graft.merge(run, tmp_path / "merged")
    source = load_file(half / "model.safetensors")
    for folder in ("out", "merged"):
        found = load_file(tmp_path / folder / "model.safetensors")
        same = [name for name in source if "q_proj" not in name]
        assert all(torch.equal(found[name], source[name]) for name in same)


def test_what_genai_must_know_is_that_of_the_model(half: Path) -> None:
    loaded = load_model(str(half), dtype="stored")
    loaded.model.generation_config.eos_token_id = [0, 5, 999, -1]
    loaded.model.generation_config.temperature = 0.5
    found = genai_config(loaded, "model.onnx")
    model = found["model"]
    assert (model["type"], model["vocab_size"]) == ("llama", loaded.model.config.vocab_size)
    assert model["context_length"] == loaded.model.config.max_position_embeddings
    assert model["eos_token_id"] == [0, 5], "those that the model has"
    assert model["bos_token_id"] == model["pad_token_id"] == 0
    assert model["decoder"]["filename"] == "model.onnx"
    assert model["decoder"]["inputs"]["past_key_names"] % 1 == "past_key_values.1.key"
    assert found["search"]["temperature"] == 0.5 and found["search"]["do_sample"] is False
    assert genai_notes(loaded) == ()


def test_tokens_beyond_the_embeddings_are_told(half: Path) -> None:
    loaded = load_model(str(half), weight_format=IntGroupFormat(4, 32))
    assert beyond_notes(loaded.model, loaded.tokenizer) == ()
    loaded.tokenizer.add_special_tokens({"pad_token": "<pad>"})
    (told,) = beyond_notes(loaded.model, loaded.tokenizer)
    assert "no embedding for the tokens '<pad>'" in told
    assert model_ids(loaded).pad == 0, "a token that the model has"
