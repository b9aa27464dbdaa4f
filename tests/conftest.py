"""What every test may rely on: fixed seeds, one thread, no network, the shared inputs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so set before it is

import hypothesis
import pytest
import tests.imported_quietly  # noqa: F401  (before Transformers)
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHARED = Path(__file__).resolve().parents[2] / "shared"

hypothesis.settings.register_profile("graft", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("graft")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what graft remembers out of the cache of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("GRAFT_CACHE", raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_plots() -> Iterator[None]:
    """Leave out the PNG of each run: it takes longer than to train these models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graft.api.run.report.plot_loss", lambda *drawn: None)
        yield


def _shared(kind: str) -> Path:
    folder = SHARED / kind
    if not folder.is_dir():
        pytest.skip(f"needs the shared {kind} in {folder}, beside the checkout")
    return folder


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The folder of base models beside the checkout."""
    return _shared("models")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of data sets beside the checkout."""
    return _shared("data")


WORDS = "red green blue lamp chair table oak steel light heavy small large the is a of and".split()


def sentence(number: int) -> str:
    picked = [WORDS[(number * step + step) % len(WORDS)] for step in range(1, 9)]
    return " ".join(picked)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 60,000 random weights with a byte-level tokenizer, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sentence(number) for number in range(50)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 prompt/completion rows."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [
        json.dumps({"prompt": sentence(number), "completion": sentence(number + 1)})
        for number in range(40)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
