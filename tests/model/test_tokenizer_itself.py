"""A tokenizer is what its tokenizer.json says, whatever class the folder names."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, Qwen2Config

from graft.model.folder import read_tokenizer
from graft.model.probe import probe_texts
from graft.model.save import write_tokenizer_files
from graft.model.tokenizer_itself import tokenizer_note

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
THREE_DIGITS = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
DIGITS = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
)


@pytest.fixture
def folder(tmp_path):
    """Return the function that writes a folder whose tokenizer.json has these steps."""

    def make(config, tokenizer_class, steps=None, spaces=None, **settings):
        pairs = [("1", "2"), ("12", "3"), ("Ġ", "1"), ("t", "h")]
        words = {word: index for index, word in enumerate(["<s>", "</s>", *LETTERS])}
        words |= {f"<0x{byte:02X}>": len(words) + byte for byte in range(256)}
        words |= {left + right: len(words) + at for at, (left, right) in enumerate(pairs)}
        backend = Tokenizer(models.BPE(words, pairs, byte_fallback=spaces is not None))
        if spaces is not None:
            backend.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            )
        if steps is not None:
            backend.pre_tokenizer = steps
        backend.add_special_tokens(["<s>", "</s>"])
        config.save_pretrained(tmp_path)
        backend.save(str(tmp_path / "tokenizer.json"))
        stated = {"tokenizer_class": tokenizer_class, "bos_token": "<s>", "eos_token": "</s>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(stated | settings))
        return tmp_path, backend

    return make


def words(tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in probe_texts()]


@pytest.mark.parametrize(
    ("config", "tokenizer_class", "steps", "spaces"),
    [
        (LlamaConfig(), "LlamaTokenizerFast", THREE_DIGITS, None),
        (LlamaConfig(), "GPT2TokenizerFast", DIGITS, None),
        (GPT2Config(), "GPT2Tokenizer", THREE_DIGITS, None),
        (Qwen2Config(), "LlamaTokenizerFast", THREE_DIGITS, None),
        (Qwen2Config(), "Qwen2Tokenizer", THREE_DIGITS, None),
        (LlamaConfig(), "LlamaTokenizerFast", None, "▁"),
    ],
    ids=["llama-3", "digits", "gpt-2", "qwen-distilled", "qwen", "llama-2"],
)
def test_the_file_is_read_and_not_the_class(config, tokenizer_class, steps, spaces, folder):
    path, stated = folder(config, tokenizer_class, steps, spaces)
    tokenizer = read_tokenizer(path)
    assert words(tokenizer.backend_tokenizer) == words(stated)
    taken = AutoTokenizer.from_pretrained(path).backend_tokenizer
    assert (tokenizer_note(tokenizer) is not None) == (words(taken) != words(stated))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def test_what_is_written_is_read_alike_by_transformers(folder, tmp_path):
    path, stated = folder(LlamaConfig(), "GPT2Tokenizer", DIGITS, chat_template="{{ x }}")
    tokenizer = read_tokenizer(path)
    note = tokenizer_note(tokenizer)
    assert note is not None and "as tokenizer.json says: GPT2Tokenizer" in note
    written = tmp_path / "written"
    written.mkdir()
    LlamaConfig().save_pretrained(written)

    model = SimpleNamespace(generation_config=None)
    write_tokenizer_files(SimpleNamespace(model=model, tokenizer=tokenizer), written)
    assert words(AutoTokenizer.from_pretrained(written).backend_tokenizer) == words(stated)
    stated_class = json.loads((written / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert stated_class == "PreTrainedTokenizerFast"
    again = read_tokenizer(written)
    assert tokenizer_note(again) is None and again.chat_template == "{{ x }}"


def test_a_setting_of_the_class_or_folder_alone_is_kept(folder):
    steps = pre_tokenizers.ByteLevel(add_prefix_space=False)
    path, _ = folder(GPT2Config(), "GPT2Tokenizer", steps, add_prefix_space=True)
    tokenizer = read_tokenizer(path)
    assert tokenizer_note(tokenizer) is None
    assert tokenizer.tokenize("the")[0] == "Ġ"
