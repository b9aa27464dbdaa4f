from __future__ import annotations

import gzip
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from graft.formats.int_group import IntGroupFormat
from graft.model.load import LoadedModel, load_model

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 32}
GEMMAS = {"head_dim": 16, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 16}
GEMMAS |= {"query_pre_attn_scalar": 16}
LINEAR_HALF_ROPE = LINEAR_ROPE | {"partial_rotary_factor": 0.5}
HALF_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
ARCHITECTURES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama3-rope": (
        LlamaConfig,
        {"rope_parameters": LLAMA3_ROPE, "attention_bias": True, "mlp_bias": True},
    ),
    "tied-llama": (LlamaConfig, {"tie_word_embeddings": True, "head_dim": 32}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "mistral-window": (MistralConfig, {"sliding_window": 16}),
    "qwen2": (Qwen2Config, {}),
    "tied-qwen2": (Qwen2Config, {"tie_word_embeddings": True, "rope_parameters": LINEAR_ROPE}),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
    "gemma": (GemmaConfig, {"head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"}),
    "phi": (PhiConfig, {"rope_parameters": HALF_ROPE}),
    "tied-phi": (PhiConfig, {"tie_word_embeddings": True, "rope_parameters": LINEAR_HALF_ROPE}),
    "phi3": (Phi3Config, {"sliding_window": 128}),
    "gemma2": (Gemma2Config, GEMMAS),
    "gemma3": (Gemma3TextConfig, GEMMAS | {"num_hidden_layers": 7}),
    "yarn-llama": (LlamaConfig, {"rope_parameters": YARN}),
    "yarn-mistral": (
        MistralConfig,
        {"sliding_window": None, "rope_parameters": YARN | {"attention_factor": 1.3}},
    ),
    "yarn-qwen2": (
        Qwen2Config,
        {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
    ),
    "yarn-qwen3": (Qwen3Config, {"head_dim": 32, "rope_parameters": YARN}),
    "gpt2": (GPT2Config, {"n_inner": 96}),
    "gpt2-erf": (GPT2Config, {"activation_function": "gelu"}),
    "falcon-7b": (FalconConfig, {"ffn_hidden_size": 96}),
    "falcon-11b": (
        FalconConfig,
        {
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
            "tie_word_embeddings": False,
        },
    ),
    "falcon-40b": (FalconConfig, {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-many-keys": (FalconConfig, {"multi_query": False, "rope_parameters": LINEAR_ROPE}),
}


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """Return a function from a name above, and settings beside its own, to a random model."""

    def make(name: str, **changes: Any) -> PreTrainedModel:
        kind, own = ARCHITECTURES[name]
        # GPT-2 and Falcon call some of the sizes otherwise.
        known = {key: value for key, value in SIZES.items() if hasattr(kind(), key)}
        model = AutoModelForCausalLM.from_config(kind(**known | own | changes)).eval()
        for parameter in model.parameters():  # norms and biases of 1 and 0 would hide mistakes
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter.data, 1.0, 0.2)
        return model

    return make


@pytest.fixture
def tiny_loaded(
    tiny_model: Callable[..., PreTrainedModel], tiny_base: Path, tmp_path: Path
) -> Callable[..., LoadedModel]:
    """Return a function to such a model as graft loads it, quantised to so many bits."""

    def make(name: str, bits: int | None, vocab_size: int = 160) -> LoadedModel:
        source = tmp_path / "source"
        tiny_model(name, vocab_size=vocab_size).save_pretrained(source)
        for file in tiny_base.glob("*token*"):
            (source / file.name).write_bytes(file.read_bytes())
        weight_format = None if bits is None else IntGroupFormat(bits, 32)
        return load_model(str(source), weight_format=weight_format, dtype="float32")

    return make


@pytest.fixture(scope="session")
def stories(shared_data: Path) -> list[str]:
    with gzip.open(shared_data / "tinystories" / "heldout.jsonl.gz", "rt") as lines:
        return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="session")
def first_ids() -> Callable[..., torch.Tensor]:
    """Return a function to the first ids of those texts that have so many."""

    def make(tokenizer: Any, texts: list[str], length: int) -> torch.Tensor:
        rows = [tokenizer(text)["input_ids"] for text in texts]
        return torch.tensor([row[:length] for row in rows if len(row) >= length])

    return make


@pytest.fixture(scope="session")
def bases(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random Llama and a random GPT-2 as folders, every tensor of them moved."""
    sizes = {"vocab_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"hidden_size": 64, "max_position_embeddings": 64, "bos_token_id": 0}
    configs = {
        "llama": LlamaConfig(**sizes, intermediate_size=96, num_key_value_heads=2, eos_token_id=0),
        "gpt2": GPT2Config(**sizes, eos_token_id=0),
    }
    folders = {}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for family, config in configs.items():
            model = AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
            folders[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(folders[family])
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(tiny_base / file, folders[family] / file)
    return folders


@pytest.fixture(scope="session")
def readers() -> Any:
    """benchmarks/_file_weights.py, which reads each file with its own format's reader."""
    file = Path(__file__).parents[2] / "benchmarks" / "_file_weights.py"
    spec = importlib.util.spec_from_file_location("_file_weights", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def base(tiny_base, tmp_path):
    """A Llama whose rows bitsandbytes 0.50 multiplies correctly: multiples of 64 inputs."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    for file in tiny_base.glob("*token*"):
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "base"
