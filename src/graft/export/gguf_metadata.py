"""What a GGUF file says about the model: hyper-parameters, and which models it can describe."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import gguf

from graft.export.layers import Architecture, config_problems
from graft.model.gguf_layout import ROPE_PARAMETERS_KEY, head_dim

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_KNOWN = {
    "llama": Architecture(),
    "mistral": Architecture(),
    "qwen2": Architecture(rope_types=("default", "linear")),
    "qwen3": Architecture(rope_types=("default", "linear")),
    "gemma": Architecture(("gelu_pytorch_tanh",), ("default", "linear")),
}
"""What llama.cpp computes for each of gguf_layout's architectures."""


def gguf_config_problems(config: PretrainedConfig) -> list[str]:
    """Return every reason why llama.cpp's architecture of that name cannot run this model."""
    return config_problems(config, "GGUF", _KNOWN)


def add_model_metadata(writer: gguf.GGUFWriter, config: PretrainedConfig, name: str) -> None:
    """Write the name and the hyper-parameters; the file's type and tokenizer are added elsewhere.

    A sliding attention window, which llama.cpp's Llama does not know, bounds the context length:
    within it the answers are the same.
    """
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    writer.add_context_length(min(config.max_position_embeddings, window or 2**31))
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim(config))
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "llama3":
        writer.add_string(ROPE_PARAMETERS_KEY, json.dumps(rope))
