"""What a GGUF file says about the model: hyper-parameters, and which models it can describe."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import gguf
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from graft.export.layers import (
    activation,
    config_problems,
    rotary,
    yarn_factor,
    yarn_problems,
    yarn_scaling,
)
from graft.model.families import exported, family_of
from graft.model.gguf.layout import ROPE_PARAMETERS_KEY, gguf_layout, head_dim, key_value_heads

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ERF = "gelu"
_BETAS = {"beta_fast": 32, "beta_slow": 1}
_LOCAL = {"rope_type": "default", "rope_theta": 10000.0}
_ORIGINAL = "original_max_position_embeddings"


def gguf_config_problems(config: PretrainedConfig) -> list[str]:
    """Return every reason why llama.cpp's architecture of that name cannot run this model."""
    problems = config_problems(config, "GGUF", exported("gguf")) + yarn_problems(config, "GGUF")
    rope = rotary(config)
    for name, usual in _BETAS.items() if rope["rope_type"] == "yarn" else ():
        if (rope.get(name) or usual) != usual:
            problems.append(
                f"YaRN's {name} is {rope[name]}; programs on llama.cpp take {usual}, whatever a "
                "file says; export as a plain folder instead (--to hf)"
            )
    return problems + ([] if problems else _gemma_problems(config))


def _gemma_problems(config: PretrainedConfig) -> list[str]:
    """Return what Gemma's configuration asks for and llama.cpp, which has it fixed, does not do."""
    layout = gguf_layout(config)
    if not layout.window_every:
        return []
    instead = "export as a plain folder instead (--to hf)"
    problems = []
    bounded = ["sliding_attention"] * (layout.window_every - 1) + ["full_attention"]
    expected = [bounded[index % len(bounded)] for index in range(config.num_hidden_layers)]
    if list(config.layer_types) != expected or not config.sliding_window:
        problems.append(
            f"its layer_types are not those of llama.cpp's {layout.architecture}, where each "
            f"{layout.window_every}th layer sees the whole text and the others a sliding window; "
            f"{instead}"
        )
    local = config.rope_parameters.get("sliding_attention", rotary(config))
    differs = any(local.get(name) != value for name, value in _LOCAL.items())
    if layout.architecture == "gemma3" and differs:
        problems.append(
            f"the rotary settings of its local layers are {local}; llama.cpp has rope_theta "
            f"{_LOCAL['rope_theta']:g} there; {instead}"
        )
    wide = config.num_hidden_layers == layout.wide_at
    width = config.hidden_size // config.num_attention_heads if wide else head_dim(config)
    if config.query_pre_attn_scalar != width:
        problems.append(
            f"query_pre_attn_scalar is {config.query_pre_attn_scalar}; llama.cpp takes {width} "
            f"for a model of these sizes; {instead}"
        )
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if bool(getattr(config, name, None)) is not layout.softcaps:
            stated = "a number" if layout.softcaps else "none"
            problems.append(f"{name} is {getattr(config, name)}; expected {stated}; {instead}")
    return problems


def gguf_config_notes(config: PretrainedConfig) -> tuple[str, ...]:
    """Return what llama.cpp computes a little differently, in words."""
    notes = []
    if activation(config) == _ERF:
        notes.append(
            "llama.cpp computes GELU by its approximation with tanh, which differs from the "
            "model's by 5e-4 at most"
        )
    if rotary(config)["rope_type"] == "longrope":
        notes.append(
            f"the file's context is {context_length(config)} tokens, up to which texts are short "
            "for LongRoPE; in a larger one (llama.cpp's --ctx-size) llama.cpp takes the factors of "
            "long texts for every text, the model for long texts alone"
        )
    return tuple(notes)


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
    if layout.window_every:
        writer.add_sliding_window(config.sliding_window)
    if layout.softcaps:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if layout.rotary:
        _add_rope_metadata(writer, config)


def context_length(config: PretrainedConfig) -> int:
    """Return the number of tokens up to which llama.cpp computes what the model does.

    With YaRN that is what its factor makes of the original one, whatever the configuration says;
    with LongRoPE what it takes the factors of short texts for.
    """
    window = config.sliding_window if family_of(config).windowed else None
    length = int(config.max_position_embeddings)
    rope = rotary(config)
    if rope["rope_type"] == "yarn":
        length = max(length, int(yarn_factor(config) * rope[_ORIGINAL]))
    elif rope["rope_type"] == "longrope":
        length = min(length, rope[_ORIGINAL])
    return int(min(length, window or 2**31))


def _feed_forward_length(config: PretrainedConfig) -> int:
    return int(getattr(config, gguf_layout(config).feed_forward) or 4 * config.hidden_size)


def _add_rope_metadata(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    rope = rotary(config)
    writer.add_rope_dimension_count(int(head_dim(config) * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    match rope["rope_type"]:
        case "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        case "llama3":
            writer.add_string(ROPE_PARAMETERS_KEY, json.dumps(rope))
        case "yarn":
            _add_yarn_metadata(writer, config)
        case "longrope":  # whose factors are tensors
            writer.add_rope_scaling_orig_ctx_len(rope[_ORIGINAL])
            _, scaling = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
            writer.add_rope_scaling_attn_factors(scaling)


def _add_yarn_metadata(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    """llama.cpp multiplies by attn_factor what it makes of the factor by YaRN's own formula."""
    rope, factor = config.rope_parameters, yarn_factor(config)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(rope[_ORIGINAL])
    usual, stated = yarn_scaling(factor), _scaling(config)
    if stated != usual:
        writer.add_rope_scaling_attn_factors(stated / usual)


def _scaling(config: PretrainedConfig) -> float:
    _, scaling = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    return float(scaling)
