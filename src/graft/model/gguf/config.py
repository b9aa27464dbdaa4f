"""The configuration of a model from a GGUF file's metadata."""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig

from graft.errors import GraftError, raise_problems
from graft.model.families import FAMILIES, Family, GgufLayout
from graft.model.gguf.file import GgufFile
from graft.model.gguf.layout import ROPE_PARAMETERS_KEY, rope_factors
from graft.text import quoted
from graft.understood import understood


def _read_families() -> dict[str, tuple[Family, GgufLayout]]:
    """Return the families that are read, by llama.cpp's architecture."""
    rows = ((family, family.gguf) for family in FAMILIES.values())
    return {
        layout.architecture: (family, layout) for family, layout in rows if layout and layout.read
    }


def gguf_config(file: GgufFile) -> PretrainedConfig:
    """Return the configuration; raises GraftError where the metadata do not make one."""
    architecture = file.value("general.architecture", str)
    known = _read_families()
    if architecture not in known:
        raise GraftError(
            f"{file.path}: architecture is {quoted(architecture)}; graft reads GGUF files of "
            f"{', '.join(known)}"
        )
    family, layout = known[architecture]

    def size(key: str, default: int | None = None) -> int:
        found: int = file.value(f"{architecture}.{key}", int, default)
        return found

    hidden, heads = size("embedding_length"), size("attention.head_count")
    embedding = file.tensors.get("token_embd.weight")
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": size("block_count"),
        "num_attention_heads": heads,
        # Where all is as usual, llama.cpp's converter leaves these out.
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "head_dim": size("attention.key_length", hidden // max(heads, 1)),
        "vocab_size": size("vocab_size", None if embedding is None else embedding.shape[0]),
        "max_position_embeddings": size("context_length"),
    }
    problems = [
        f"{field} is {found}; expected at least 1" for field, found in sizes.items() if found < 1
    ]
    # Also keeps a damaged count from building millions of layers.
    blocks = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    if sizes["num_hidden_layers"] != len(blocks):
        problems.append(
            f"metadata says {sizes['num_hidden_layers']} blocks, the tensors make {len(blocks)}"
        )
    raise_problems(problems, f"{file.path}")
    settings: dict[str, Any] = sizes | {
        f"{name}_token_id": file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    if layout.optional_head_dim and settings["head_dim"] * heads == hidden:
        del settings["head_dim"]
    for setting, layer in layout.bias_settings.items():
        settings[setting] = f"blk.0.{layer}.bias" in file.tensors
    settings |= layout.settings
    settings["rms_norm_eps"] = file.number(f"{architecture}.attention.layer_norm_rms_epsilon")
    settings["tie_word_embeddings"] = "output.weight" not in file.tensors
    with understood(file.path):
        config = CONFIG_MAPPING[family.model_type](**settings)
    config.rope_parameters = _rope_parameters(file, architecture, config)
    return config


def _rope_parameters(file: GgufFile, architecture: str, config: PretrainedConfig) -> dict[str, Any]:
    if ROPE_PARAMETERS_KEY in file.metadata:
        with understood(file.path, f"has metadata {ROPE_PARAMETERS_KEY} that are not understood"):
            return dict(json.loads(file.value(ROPE_PARAMETERS_KEY, str)))
    theta = file.number(f"{architecture}.rope.freq_base", 10000.0)
    factors = file.tensors.get("rope_freqs.weight")
    if factors is not None:
        return _llama3_rope(file, factors.dense(), config, theta)
    scaling = file.value(f"{architecture}.rope.scaling.type", str, "none")
    if scaling == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if scaling != "linear":
        raise GraftError(
            f"{file.path}: rope scaling is {quoted(scaling)}; graft reads none, linear and llama3"
        )
    factor = file.number(f"{architecture}.rope.scaling.factor")
    return {"rope_type": "linear", "rope_theta": theta, "factor": factor}


def _llama3_rope(
    file: GgufFile, factors: torch.Tensor, config: PretrainedConfig, theta: float
) -> dict[str, Any]:
    """Return Llama 3's settings, where they are what makes the file's factors.

    llama.cpp's converter keeps the factors alone. Only the largest one differs between the models
    that Meta has published.
    """
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config.rope_parameters = rope
    made = rope_factors(config)
    if made is None or made.shape != factors.shape or not torch.allclose(made, factors, 1e-4):
        raise GraftError(
            f"{file.path}: has rotary factors that are not those of Llama 3.1 and later, and no "
            f"{ROPE_PARAMETERS_KEY}, which says what makes them in a file that graft wrote"
        )
    return rope
