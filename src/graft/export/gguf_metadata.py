"""What a GGUF file says about the model: hyper-parameters, and which models it can describe."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import gguf

from graft.model.gguf_layout import ROPE_PARAMETERS_KEY, head_dim

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MODEL_TYPES = ("llama", "mistral")
ROPE_TYPES = ("default", "linear", "llama3")


def config_problems(config: PretrainedConfig) -> list[str]:
    """Return every reason why llama.cpp's Llama architecture cannot run this model."""
    if config.model_type not in MODEL_TYPES:
        return [
            f"model_type is {config.model_type!r}; GGUF export writes the Llama family "
            f"({', '.join(MODEL_TYPES)}); export this model as a folder instead (--to hf)"
        ]
    problems = []
    if config.hidden_act != "silu":
        problems.append(
            f"hidden_act is {config.hidden_act!r}; llama.cpp's Llama computes 'silu'; "
            "export as a folder instead (--to hf)"
        )
    rope = config.rope_parameters
    if rope["rope_type"] not in ROPE_TYPES:
        problems.append(
            f"rope_type is {rope['rope_type']!r}; GGUF export writes {', '.join(ROPE_TYPES)}; "
            "export as a folder instead (--to hf)"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(
            f"partial_rotary_factor is {rope['partial_rotary_factor']}; llama.cpp's Llama rotates "
            "whole heads (1.0); export as a folder instead (--to hf)"
        )
    return problems


def add_model_metadata(writer: gguf.GGUFWriter, config: PretrainedConfig, name: str) -> None:
    """Write the name and the hyper-parameters; the file's type and tokenizer are added elsewhere.

    A sliding attention window, which llama.cpp's Llama does not know, bounds the context length:
    within it the answers are the same.
    """
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    window = getattr(config, "sliding_window", None)  # only Mistral's configuration has it
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
