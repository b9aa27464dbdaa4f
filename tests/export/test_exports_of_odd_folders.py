"""Whole exports of folders with a token too many, or a name that llama.cpp reads something into."""

from __future__ import annotations

import json
import shutil

import gguf
import pytest
import torch
from tests.api.foreign_adapters import low_rank, save_peft
from tests.model.every_family import write_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import graft
from graft.api.events import Events
from graft.api.export import next_export
from graft.errors import GraftError
from graft.model.load import load_model


@pytest.fixture
def padded(tiny_base, tmp_path):
    """A base called phi3-like, to whose tokenizer somebody added a <pad>."""
    folder = tmp_path / "phi3-like"
    shutil.copytree(tiny_base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    return folder


def fields(path):
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def test_a_pad_token_that_was_added_is_left_out_and_told(padded, tmp_path):
    report = graft.export_model(padded, "gguf", tmp_path / "m.gguf")
    found = fields(tmp_path / "m.gguf")
    assert len(found["tokenizer.ggml.tokens"]) == found["llama.vocab_size"]
    assert "<pad>" not in found["tokenizer.ggml.tokens"]
    assert "tokenizer.ggml.padding_token_id" not in found
    assert found["general.name"] == "Phi_3-like"
    assert any("'<pad>' are left out" in note for note in report.notes)


@pytest.mark.parametrize("target", ["hf", "mlx"])
def test_folders_keep_the_token_and_tell_it(target, padded, tmp_path):
    report = graft.export_model(padded, target, tmp_path / "out")
    assert any("no embedding for the tokens '<pad>'" in note for note in report.notes)
    written = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "A sentence, 123 of them."
    assert written(text)["input_ids"] == AutoTokenizer.from_pretrained(padded)(text)["input_ids"]
    if target == "hf":
        again = load_model(str(tmp_path / "out"))
        assert again.model.config.vocab_size == len(again.tokenizer) - 1


@pytest.mark.parametrize("target", ["hf", "gguf"])
def test_settings_that_name_the_token_for_padding_lose_it(target, padded, tmp_path):
    plain = load_model(str(padded)).model
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((padded / name).read_text()) if (padded / name).is_file() else {}
        number = plain.config.vocab_size
        (padded / name).write_text(json.dumps(settings | {"pad_token_id": number}))
    told = []

    class Told(Events):
        def note(self, text):
            told.append(text)

    graft.export_model(padded, target, tmp_path / "out", events=Told())
    assert any(f"pad_token_id of config.json, {number}, is left out" in text for text in told)
    if target == "hf":
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert again.generation_config.pad_token_id is None
        ids = torch.arange(4, 20)[None]
        with torch.no_grad():
            assert torch.equal(again(ids).logits, plain(ids).logits)


def test_a_run_with_such_a_token_is_trained_and_exported(padded, rows, tmp_path):
    settings = {"method": "lora", "steps": 1, "batch_size": 4, "rank": 2, "export": ["gguf"]}
    told = []

    class Told(Events):
        def note(self, text):
            told.append(text)

    config = graft.TrainConfig(
        model=str(padded), data=str(rows), out=str(tmp_path / "run"), **settings
    )
    graft.finetune(config, events=Told())
    assert fields(tmp_path / "run" / "export" / "model.gguf")["general.name"] == "Phi_3-like"
    assert any(text.startswith("model.gguf: added tokens '<pad>'") for text in told)


def test_the_token_in_the_data_is_an_error_that_names_it(padded, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"word {n} <pad>"}) + "\n" for n in range(20)))
    config = graft.TrainConfig(
        model=str(padded), data=str(data), method="lora", steps=1, out=str(tmp_path / "run")
    )
    with pytest.raises(GraftError, match="token '<pad>' has the number"):
        graft.finetune(config)
    assert not (tmp_path / "run").exists()


def test_a_model_that_llama_cpp_has_not_is_refused_before_the_merge_and_goes_elsewhere(
    tiny_base, tmp_path
):
    base, run, told = tmp_path / "olmo2", tmp_path / "run", []

    class Told(Events):
        def note(self, text):
            told.append(text)

    adapter = save_peft(tmp_path / "a", low_rank(write_tiny("olmo2", base, tiny_base)), base)
    graft.adopt(adapter, run)
    with pytest.raises(GraftError, match="--to gguf: model_type is 'olmo2'"):
        graft.export_model(run, "gguf", tmp_path / "m.gguf", events=Told())
    assert told == []
    assert next_export(run) == f"graft export {run} --to hf --out run-hf"
    assert graft.export_model(run, "hf", tmp_path / "hf").merge.exact is False
