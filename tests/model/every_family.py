"""A tiny model of every family that Transformers has a causal language model for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

EVERY_FAMILY = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""By model_type."""
PARAMETERS = 20_000_000
"""A configuration that stays above cannot be made tiny by the settings below."""

_SMALL: dict[str, int] = {
    **dict.fromkeys(("vocab_size",), 320),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "embed_dim"), 64),
    **dict.fromkeys(("word_embed_proj_dim", "attention_hidden_size", "lru_width"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "d_inner", "dff"), 96),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size"), 96),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 64),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts",), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_top_k",), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 32),
    **dict.fromkeys(("state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_chunk_size", "chunk_size"), 16),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("sliding_window", "attention_window_size"), 16),
    **dict.fromkeys(("index_head_dim",), 16),
    **dict.fromkeys(("index_n_heads",), 2),
    **dict.fromkeys(("index_topk",), 8),
    "mamba_d_ssm": 128,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
}  # fmt: skip
_PER_LAYER = {"vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 16}
_INKLING = {"rel_extent": 16, "swa_num_attention_heads": 4, "swa_head_dim": 16} | {
    "swa_num_key_value_heads": 2
}
_LATENT = {"head_dim": ..., "num_key_value_heads": 4}
_HYBRID = {"num_hidden_layers": 4}
_MORE: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "axk2": _LATENT,
    "bailing_hybrid": _LATENT | {"num_hidden_layers": 8},
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "cpmant": {"dim_head": 16, "dim_ff": 96},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8}},
    "deepseek_v2": _LATENT | {"num_experts_per_tok": 2},
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon": {"head_dim": ...},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 0, **_PER_LAYER},
    "gemma4_text": _PER_LAYER,
    "gemma4_unified_text": _PER_LAYER,
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "inkling2_text": _INKLING,
    "inkling_text": _INKLING,
    "jamba": {"num_hidden_layers": 5},
    "kimi_linear": _LATENT | {"num_hidden_layers": 5, "linear_head_dim": 16, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"], "num_dense_layers": 1},
    "lfm3": _HYBRID,
    "longcat_flash": {"ffn_hidden_size": 96, "zero_expert_num": 2, "num_key_value_heads": 4},
    "mamba2": {"num_heads": 8},
    "minicpm3": _LATENT,
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "prophetnet": {
        "num_hidden_layers": ...,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
    },
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_5_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "recurrent_gemma": _HYBRID,
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [32, 32],
        "attn_layers": ["local", "lsh"],
        "num_hidden_layers": ...,
        "feed_forward_size": 96,
        "attention_head_size": 16,
        "num_buckets": 2,
    },
    "roc_bert": {"shape_vocab_size": 20, "pronunciation_vocab_size": 20},
    "xlnet": {"max_position_embeddings": ..., "n_ctx": ...},
    "xlstm": {"v_head_dim": ..., "qk_head_dim": ...},
    "xmod": {"default_language": "en_XX"},
    "youtu": _LATENT,
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "attention_hidden_size": 128,
    },
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
}
"""What a family needs besides, or instead; `...` leaves a setting as it is by itself."""


def tiny_config(family: str) -> PreTrainedConfig:
    """Return a configuration of a family, as small as its own settings allow."""
    kind = CONFIG_MAPPING[family]
    return kind(**_small_settings(kind, _MORE.get(family, {})))


def _small_settings(kind: type[PreTrainedConfig], more: dict[str, Any]) -> dict[str, Any]:
    usual = kind()
    settings: dict[str, Any] = {}
    for name, value in _SMALL.items():
        try:
            if getattr(usual, name, None) is not None:
                settings[name] = value
        except RuntimeError:  # a setting that differs by layer refuses to be read as one
            settings[name] = value
    for name, part in kind.sub_configs.items():
        if isinstance(part, type) and hasattr(part, "from_dict"):
            settings[name] = _small_settings(part, more.get(name, {}))
    return {k: v for k, v in (settings | more).items() if v is not ...}


def tiny_model(family: str) -> PreTrainedModel:
    """Return a model of a family in float32, whose every tensor differs from where it starts."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def write_tiny(
    family: str, folder: Path, tokenizer: Path, *, published: bool = False
) -> PreTrainedModel:
    """Write a tiny model of a family as Transformers does, with a tokenizer; return the model.

    published: with the tensors that the family's files have on the hub, where those are others.
    """
    model = tiny_model(family)
    model.save_pretrained(folder, save_original_format=published)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, folder / file)
    return model


_BOTH = "attends both ways, as masked language models do"
_DECODER = "describes an encoder-decoder"
ATTEND_BOTH_WAYS = {
    **dict.fromkeys(("bert", "bert-generation", "big_bird", "camembert", "data2vec-text"), _BOTH),
    **dict.fromkeys(("electra", "ernie", "megatron-bert", "rembert", "roberta"), _BOTH),
    **dict.fromkeys(("roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xmod"), _BOTH),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl"), _BOTH),
    "cpmant": "sees the whole prompt",
    "xlnet": "predicts tokens in any order",
}
"""Families whose "causal" class, as it is built by itself, is none, and what is said of them."""
REFUSED = {
    **ATTEND_BOTH_WAYS,
    **dict.fromkeys(("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small"), _DECODER),
    **dict.fromkeys(("marian", "mbart", "mvp", "pegasus", "plbart", "prophetnet"), _DECODER),
    "reformer": "texts of one length",
    "trocr": "reads an image",
    "whisper": _DECODER,
}
"""Families that are not loaded at all."""
