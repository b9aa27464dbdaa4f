"""The tokenizer that lies in an adapter's folder goes into the run, and into all made of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import pytest
from tests.api.foreign_adapters import dense, low_rank, save_peft
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

import graft
from graft.errors import GraftError

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKS = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """The base with room for two more tokens, and with an ending in its defaults of generation."""
    folder = tmp_path / "base"
    model = dense(tiny_base)
    model.resize_token_embeddings(model.config.vocab_size + 2, mean_resizing=False)
    model.save_pretrained(folder)
    words = AutoTokenizer.from_pretrained(tiny_base)
    words.save_pretrained(folder)
    GenerationConfig(eos_token_id=words.eos_token_id).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return save_peft(tmp_path / "adapter", low_rank(dense(base)), base)


def chatting(base: Path) -> PreTrainedTokenizerBase:
    words = AutoTokenizer.from_pretrained(base)
    words.add_special_tokens({"additional_special_tokens": MARKS})
    words.eos_token, words.chat_template = MARKS[1], CHAT
    return words


def test_it_goes_into_the_run_and_all_that_is_made_of_it(base, adapter, tmp_path) -> None:
    words = chatting(base)
    words.save_pretrained(adapter)
    first = AutoTokenizer.from_pretrained(base).eos_token_id
    ending = words.eos_token_id
    report = graft.adopt(adapter, tmp_path / "run")
    assert report.tokenizer is not None
    for piece in ("the chat template", "'<|im_end|>' (the base has", "2 added tokens"):
        assert piece in report.tokenizer
    assert report.tokenizer in (tmp_path / "run" / "report.md").read_text().replace("\\", "")
    model, found = graft.load(tmp_path / "run")
    assert found.chat_template == CHAT and found.eos_token_id == ending
    assert model.generation_config.eos_token_id == [ending, first]
    style = json.loads((tmp_path / "run" / "prompt.json").read_text())
    assert style["kind"] == "messages"

    for target in ("hf", "mlx", "gguf", "ollama"):
        graft.export_model(tmp_path / "run", target, tmp_path / target)
    graft.merge(tmp_path / "run", tmp_path / "merged")
    for folder in ("hf", "mlx", "merged"):
        found = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert found.get_vocab() == words.get_vocab()
        assert (found.chat_template, found.eos_token) == (CHAT, MARKS[1])
        settings = json.loads((tmp_path / folder / "generation_config.json").read_text())
        assert settings["eos_token_id"] == [ending, first]
    fields = gguf.GGUFReader(tmp_path / "gguf").fields
    assert fields["tokenizer.chat_template"].contents() == CHAT
    assert fields["tokenizer.ggml.eos_token_id"].contents() == ending
    assert fields["tokenizer.ggml.tokens"].contents()[ending] == MARKS[1]
    assert 'stop "<|im_end|>"' in (tmp_path / "ollama" / "Modelfile").read_text()


def test_one_that_is_the_bases_own_leaves_nothing(base, adapter, tmp_path) -> None:
    AutoTokenizer.from_pretrained(base).save_pretrained(adapter)
    report = graft.adopt(adapter, tmp_path / "run")
    assert report.tokenizer is None and not (tmp_path / "run" / "tokenizer").exists()


def test_with_a_base_of_its_own_it_lies_there(base, adapter, tmp_path) -> None:
    chatting(base).save_pretrained(adapter)
    graft.adopt(adapter, tmp_path / "run", format="nf4")
    assert not (tmp_path / "run" / "tokenizer").exists()
    model, found = graft.load(tmp_path / "run")
    assert found.chat_template == CHAT
    assert model.generation_config.eos_token_id[0] == found.eos_token_id


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
def test_a_chat_template_alone(name, base, adapter, tmp_path) -> None:
    text = CHAT if name.endswith("jinja") else json.dumps({"chat_template": CHAT})
    (adapter / name).write_text(text)
    report = graft.adopt(adapter, tmp_path / "run")
    assert report.tokenizer == "the chat template"
    _, found = graft.load(tmp_path / "run")
    plain = AutoTokenizer.from_pretrained(base)
    assert found.chat_template == CHAT and found.get_vocab() == plain.get_vocab()


def test_special_and_added_tokens_alone(base, adapter, tmp_path) -> None:
    count = len(AutoTokenizer.from_pretrained(base))
    added = {MARKS[0]: count, MARKS[1]: count + 1}
    (adapter / "added_tokens.json").write_text(json.dumps(added))
    special = {"eos_token": {"content": MARKS[1], "lstrip": False}}
    (adapter / "special_tokens_map.json").write_text(json.dumps(special))
    report = graft.adopt(adapter, tmp_path / "run")
    assert "2 added tokens" in str(report.tokenizer)
    model, found = graft.load(tmp_path / "run")
    assert found.convert_tokens_to_ids(MARKS) == [count, count + 1]
    assert found.eos_token == MARKS[1]
    assert model.generation_config.eos_token_id[0] == count + 1
    (adapter / "added_tokens.json").write_text(json.dumps({MARKS[0]: 7}))
    with pytest.raises(GraftError, match="the number 7; on the base's vocabulary it is"):
        graft.adopt(adapter, tmp_path / "again")


def test_settings_without_a_vocabulary(base, adapter, tmp_path) -> None:
    chatting(base).save_pretrained(tmp_path / "whole")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tmp_path / "whole" / name, adapter)
    settings = json.loads((adapter / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == MARKS[1]
    graft.adopt(adapter, tmp_path / "run")
    _, found = graft.load(tmp_path / "run")
    assert found.eos_token == MARKS[1] and found.chat_template == CHAT
    assert found.get_vocab().items() >= AutoTokenizer.from_pretrained(base).get_vocab().items()


def test_a_vocabulary_without_settings_or_template_keeps_the_bases(base, adapter, tmp_path) -> None:
    (base / "chat_template.jinja").write_text(CHAT)
    chatting(base).save_pretrained(tmp_path / "whole")
    shutil.copy(tmp_path / "whole" / "tokenizer.json", adapter)
    graft.adopt(adapter, tmp_path / "run")
    _, found = graft.load(tmp_path / "run")
    plain = AutoTokenizer.from_pretrained(base)
    assert found.chat_template == CHAT and found.eos_token == plain.eos_token
    assert len(found) == len(plain) + 2


def test_a_base_without_any(base, adapter, tmp_path) -> None:
    chatting(base).save_pretrained(adapter)
    for file in base.glob("tokenizer*"):
        file.unlink()
    graft.adopt(adapter, tmp_path / "run")
    assert graft.load(tmp_path / "run")[1].eos_token == MARKS[1]
    graft.merge(tmp_path / "run", tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == CHAT


def test_defaults_of_generation_that_lie_there(base, adapter, tmp_path) -> None:
    (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": 5, "top_k": 3}))
    report = graft.adopt(adapter, tmp_path / "run")
    assert report.tokenizer == "the defaults of generation"
    generation = graft.load(tmp_path / "run")[0].generation_config
    assert (generation.eos_token_id, generation.top_k) == (5, 3)


def test_tokens_that_no_row_of_the_embedding_belongs_to_are_told(base, adapter, tmp_path) -> None:
    words = chatting(base)
    words.add_tokens(["<more>"])
    words.save_pretrained(adapter)
    report = graft.adopt(adapter, tmp_path / "run")
    assert "no embedding for the tokens '<more>' of its tokenizer" in report.notes[0]
