"""What a GGUF file says about the model: hyper-parameters, and which models it can describe."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import gguf

from graft.export.layers import activation, config_problems
from graft.model.families import exported, family_of
from graft.model.gguf.layout import ROPE_PARAMETERS_KEY, gguf_layout, head_dim, key_value_heads

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ERF = "gelu"


def gguf_config_problems(config: PretrainedConfig) -> list[str]:
    """Return every reason why llama.cpp's architecture of that name cannot run this model."""
    return config_problems(config, "GGUF", exported("gguf"))


def gguf_config_notes(config: PretrainedConfig) -> tuple[str, ...]:
    """Return what llama.cpp computes a little differently, in words."""
    if activation(config) != _ERF:
        return ()
    return (
        "llama.cpp computes GELU by its approximation with tanh, which differs from the model's "
        "by 5e-4 at most",
    )


def add_model_metadata(writer: gguf.GGUFWriter, config: PretrainedConfig, name: str) -> None:
    """Write the name and the hyper-parameters; the file's type and tokenizer are added elsewhere.

    A sliding attention window, which llama.cpp's Llama and Phi-3 do not know, bounds the context
    length: within it the answers are the same.
    """
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_context_length(context_length(config))
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(_feed_forward_length(config))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(key_value_heads(config))
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    layout = gguf_layout(config)
    epsilon = getattr(config, layout.epsilon)
    if layout.epsilon == "rms_norm_eps":
        writer.add_layer_norm_rms_eps(epsilon)
    else:
        writer.add_layer_norm_eps(epsilon)
    if layout.rotary:
        _add_rope_metadata(writer, config)


def context_length(config: PretrainedConfig) -> int:
    """Return the number of tokens up to which llama.cpp computes what the model does."""
    window = config.sliding_window if family_of(config).windowed else None
    return int(min(config.max_position_embeddings, window or 2**31))


def _feed_forward_length(config: PretrainedConfig) -> int:
    return int(getattr(config, gguf_layout(config).feed_forward) or 4 * config.hidden_size)


def _add_rope_metadata(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    rope = config.rope_parameters
    writer.add_rope_dimension_count(int(head_dim(config) * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "llama3":
        writer.add_string(ROPE_PARAMETERS_KEY, json.dumps(rope))
