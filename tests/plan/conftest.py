from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

VOCABULARY = 90
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


def llama(**changes: object) -> PreTrainedConfig:
    settings = {
        "hidden_size": 48,
        "intermediate_size": 172,  # no multiple of 32: short groups, straddling blocks
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    return LlamaConfig(**(settings | _SPECIAL | changes))


def gpt2(**changes: object) -> PreTrainedConfig:
    settings = {"n_embd": 48, "n_layer": 3, "n_head": 4, "vocab_size": VOCABULARY}
    return GPT2Config(**(settings | _SPECIAL | {"n_positions": 64} | changes))


def qwen2(**changes: object) -> PreTrainedConfig:
    config = llama().to_dict()
    kept = {key: config[key] for key in ("hidden_size", "intermediate_size", "vocab_size")}
    kept |= {key: config[key] for key in config if key.startswith("num_")}
    return Qwen2Config(**(kept | _SPECIAL | {"max_position_embeddings": 64} | changes))


CONFIGS = {"llama": llama, "gpt2": gpt2, "qwen2": qwen2}


def write_model(folder: Path, config: PreTrainedConfig, dtype: torch.dtype) -> Path:
    """Write a model folder with random weights and a tokenizer of single characters."""
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    vocabulary = {"<s>": 0, "</s>": 1} | {chr(33 + i): 2 + i for i in range(VOCABULARY - 2)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="</s>"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="</s>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory):
    """Return a function from a family and the file's dtype to such a folder, made once."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def folder(family: str, dtype: torch.dtype = torch.float32) -> Path:
        if (family, dtype) not in made:
            with torch.random.fork_rng():
                path = tmp_path_factory.mktemp(family)
                made[family, dtype] = write_model(path, CONFIGS[family](), dtype)
        return made[family, dtype]

    return folder
