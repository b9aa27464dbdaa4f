"""What a GGUF file says about the model: hyper-parameters, and which models it can describe."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import gguf

from graft.model.gguf_layout import ARCHITECTURES, ROPE_PARAMETERS_KEY, head_dim

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ROPE_TYPES = ("default", "linear", "llama3")


def config_problems(config: PretrainedConfig) -> list[str]:
    """Return every reason why llama.cpp's architecture of that name cannot run this model."""
    if config.model_type not in ARCHITECTURES:
        return [
            f"model_type is {config.model_type!r}; GGUF export writes {', '.join(ARCHITECTURES)}; "
            "export this model as a folder instead (--to hf)"
        ]
    problems = []
    computed = "gelu_pytorch_tanh" if config.model_type == "gemma" else "silu"
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != computed:
        problems.append(
            f"hidden_act is {activation!r}; llama.cpp computes {computed!r}; export as a folder "
            "instead (--to hf)"
        )
    rope = config.rope_parameters
    known = ROPE_TYPES if config.model_type in ("llama", "mistral") else ROPE_TYPES[:2]
    if rope["rope_type"] not in known:
        problems.append(
            f"rope_type is {rope['rope_type']!r}; GGUF export writes {', '.join(known)}; "
            "export as a folder instead (--to hf)"
        )
    if getattr(config, "use_sliding_window", False):
        problems.append(
            "use_sliding_window is set, which llama.cpp does not do for this architecture; export "
            "as a folder instead (--to hf)"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(
            f"partial_rotary_factor is {rope['partial_rotary_factor']}; llama.cpp rotates "
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
