"""What a GGUF file says about the model: hyper-parameters, and which models it can describe."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import gguf

from graft.export.layers import Architecture, activation, config_problems
from graft.model.gguf.layout import ROPE_PARAMETERS_KEY, head_dim, key_value_heads

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
"""Names of the GELU that llama.cpp computes: the approximation by tanh."""
_ERF = "gelu"
ARCHITECTURES = {
    "llama": Architecture(),
    "mistral": Architecture(),
    "qwen2": Architecture(rope_types=("default", "linear")),
    "qwen3": Architecture(rope_types=("default", "linear")),
    "gemma": Architecture(("gelu_pytorch_tanh",), ("default", "linear")),
    "gpt2": Architecture(
        (*_TANH, _ERF),
        ("default",),
        settings={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
    ),
    "falcon": Architecture(
        (*_TANH, _ERF),
        ("default", "linear"),
        settings={"alibi": False, "parallel_attn": True, "bias": False},
    ),
    "phi": Architecture(
        (*_TANH, _ERF), ("default", "linear"), True, settings={"qk_layernorm": False}
    ),
    "phi3": Architecture(rope_types=("default",), partial_rotary=True),
}
"""What llama.cpp computes for each of gguf_layout's architectures."""


def gguf_config_problems(config: PretrainedConfig) -> list[str]:
    """Return every reason why llama.cpp's architecture of that name cannot run this model."""
    return config_problems(config, "GGUF", ARCHITECTURES)


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
    eps = getattr(config, "rms_norm_eps", None)
    if eps is not None:
        writer.add_layer_norm_rms_eps(eps)
    else:
        phi = config.model_type == "phi"
        writer.add_layer_norm_eps(config.layer_norm_eps if phi else config.layer_norm_epsilon)
    if config.model_type != "gpt2":
        _add_rope_metadata(writer, config)


def context_length(config: PretrainedConfig) -> int:
    """Return the number of tokens up to which llama.cpp computes what the model does."""
    windowed = config.model_type in ("mistral", "phi3")
    window = getattr(config, "sliding_window", None) if windowed else None
    return int(min(config.max_position_embeddings, window or 2**31))


def _feed_forward_length(config: PretrainedConfig) -> int:
    if config.model_type == "gpt2":
        return int(config.n_inner or 4 * config.hidden_size)
    if config.model_type == "falcon":
        return int(config.ffn_hidden_size)
    return int(config.intermediate_size)


def _add_rope_metadata(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    rope = config.rope_parameters
    writer.add_rope_dimension_count(int(head_dim(config) * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "llama3":
        writer.add_string(ROPE_PARAMETERS_KEY, json.dumps(rope))
