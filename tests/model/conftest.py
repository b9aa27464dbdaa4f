"""Tiny random checkpoints of several families, written by transformers itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from graft.model.load import LoadedModel, load_model

# 80 and 88 leave short groups of 32 and NF4 blocks that straddle rows; sqrt(80) is no round number.
_TINY = {
    "vocab_size": 320,
    "hidden_size": 80,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_TINY, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(
        **_TINY, tie_word_embeddings=True, rope_parameters=_LLAMA3_ROPE
    ),
    "qwen2": lambda: Qwen2Config(**_TINY),
    "mistral": lambda: MistralConfig(**_TINY, sliding_window=4),
    "gemma": lambda: GemmaConfig(**_TINY, head_dim=16),
    "gemma3": lambda: Gemma3TextConfig(**_TINY, head_dim=16, sliding_window=4),
    "gpt2": lambda: GPT2Config(
        vocab_size=320, n_embd=80, n_layer=2, n_head=5, n_positions=64, bos_token_id=0,
        eos_token_id=0,
    ),
}  # fmt: skip

Checkpoint = Callable[..., Path]


@pytest.fixture(scope="session")
def checkpoint(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A function of (family, dtype, largest file's size) that returns a read-only model folder."""
    made: dict[tuple[str, torch.dtype, str], Path] = {}

    def make(family: str, dtype: torch.dtype = torch.float32, shard: str = "1GB") -> Path:
        key = (family, dtype, shard)
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            # Seeded by itself: the weights must not depend on which test asks first.
            with torch.random.fork_rng():
                torch.manual_seed(7)
                model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=dtype)
                with torch.no_grad():
                    for parameter in model.parameters():  # biases and norms too
                        parameter.add_(torch.randn_like(parameter) * 0.05)
            model.save_pretrained(folder, max_shard_size=shard)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(tiny_base / file, folder / file)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture
def copied(checkpoint: Checkpoint, tmp_path: Path) -> Callable[..., Path]:
    """A function of the same arguments that returns a copy to damage."""

    def copy(*arguments: object) -> Path:
        return Path(shutil.copytree(checkpoint(*arguments), tmp_path / "copied"))

    return copy


@pytest.fixture
def load(checkpoint: Checkpoint) -> Callable[..., LoadedModel]:
    """Load a family's checkpoint on the CPU in float32."""

    def from_family(family: str, **options: object) -> LoadedModel:
        arguments = {"dtype": "float32", "device": "cpu"} | options
        return load_model(str(checkpoint(family)), **arguments)

    return from_family


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 320, (2, 13), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def logits(tokens: Tensor) -> Callable[[PreTrainedModel], Tensor]:
    """The logits of a model on a fixed batch."""

    def of(model: PreTrainedModel) -> Tensor:
        with torch.no_grad():
            out: Tensor = model(tokens).logits
        return out

    return of
