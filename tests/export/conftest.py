"""Tiny random Llamas with frozen layers, and small tokenizers of both kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from graft.adapters.attach import replace_module
from graft.formats.base import WeightFormat
from graft.layers.frozen import FrozenLinear

TEXT = "the cat sat on the mat, and the rat ate 12 of the 345 hats that he had there. " * 3


def freeze(model: PreTrainedModel, weight_format: WeightFormat) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            packed = weight_format.pack(module.weight.detach())
            rows, columns = module.weight.shape
            layer = FrozenLinear(columns, rows, weight_format, packed, module.bias)
            replace_module(model, name, layer)


@pytest.fixture
def make_llama() -> Callable[..., LlamaForCausalLM]:
    def make(weight_format: WeightFormat | None = None, **changes: Any) -> LlamaForCausalLM:
        settings: dict[str, Any] = {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 320,
            "max_position_embeddings": 64,
            "initializer_range": 0.3,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
        model = LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()
        for parameter in model.parameters():  # norms and biases of 1 and 0 would hide mistakes
            if parameter.dim() == 1:
                nn.init.normal_(parameter.data, 1.0, 0.3)
        model.requires_grad_(False)
        if weight_format is not None:
            freeze(model, weight_format)
        return model

    return make


@pytest.fixture
def byte_level() -> Tokenizer:
    """A byte-level BPE with two special tokens and some merges, as GPT-2 cuts words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


@pytest.fixture
def sentencepiece() -> Tokenizer:
    """A BPE as transformers makes it from SentencePiece, which puts BOS before a text."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *sorted(set(TEXT) - {" "})]
    made = ["he", "▁t", "▁the", "at", "the", "hat", "▁a"]
    vocabulary = {piece: index for index, piece in enumerate(pieces + made)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in made
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    return tokenizer


@pytest.fixture
def wrap() -> Callable[..., PreTrainedTokenizerFast]:
    """Make a transformers tokenizer from one of the tokenizers library."""

    def make(backend: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
        special = {"bos_token": "<s>", "eos_token": "</s>"} | options
        return PreTrainedTokenizerFast(tokenizer_object=backend, **special)

    return make


@pytest.fixture
def tokenizer(
    byte_level: Tokenizer, wrap: Callable[..., PreTrainedTokenizerFast]
) -> PreTrainedTokenizerFast:
    return wrap(byte_level, chat_template="{{ messages[0].content }}")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 300, (2, 40))


@pytest.fixture(scope="session")
def parsed() -> Callable[[str], list[tuple[str, str]]]:
    """Return a function from a Modelfile to its instructions, read as Ollama's parser does."""
    return _parsed


def _parsed(text: str) -> list[tuple[str, str]]:
    """Return the instructions in order; of PARAMETER the name of the parameter."""
    found, at = [], 0
    while at < len(text):
        if text[at] in " \t\r\n":
            at += 1
            continue
        if text[at] == "#":
            at = text.find("\n", at) % (len(text) + 1)
            continue
        name, _, rest = text[at:].partition(" ")
        at += len(name) + 1
        if name == "PARAMETER":
            name, _, rest = rest.partition(" ")
            at += len(name) + 1
        value, used = _value(rest)
        at += used
        found.append((name.lower(), value))
    return found


def _value(rest: str) -> tuple[str, int]:
    """Read up to the first line break outside quotes; what is not printable is dropped."""
    read = ""
    for used, letter in enumerate(rest):
        whole = _unquoted(read.strip())
        if letter in "\r\n" and whole is not None:
            return whole, used
        if letter.isprintable() or letter in " \t\r\n":
            read += letter
    whole = _unquoted(read.strip())
    assert whole is not None, f"a quote is not closed: {read!r}"
    return whole, len(rest)


def _unquoted(text: str) -> str | None:
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            closed = len(text) >= 2 * len(quotes) and text.endswith(quotes)
            return text[len(quotes) : -len(quotes)] if closed else None
    return text
