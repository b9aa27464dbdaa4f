"""Tiny random models that take pictures or sound beside text, of every family that is taken."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

_TEXT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "sliding_window": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
_OTHER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "depth": 1,
    "image_size": 28,
    "patch_size": 14,
    "out_hidden_size": 64,
    "embed_dim": 32,
    "num_layers": 1,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "d_model": 32,
    "encoder_ffn_dim": 32,
}
_THREE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_SPECIAL: dict[str, dict[str, Any]] = {
    "llama4": {"intermediate_size_mlp": 96},
    "qwen2_vl": {"rope_parameters": _THREE},
    "qwen2_5_vl": {"rope_parameters": _THREE},
    "qwen3_vl": {"rope_parameters": _THREE},
    "qwen3_5": {
        "num_hidden_layers": 4,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "gemma4": {"num_hidden_layers": 6, "global_head_dim": 16, "num_kv_shared_layers": 0,
               "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 320},
    "gemma4_unified": {"num_hidden_layers": 6, "global_head_dim": 16, "num_kv_shared_layers": 0},
}  # fmt: skip
_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id")


def multimodal_config(family: str) -> PreTrainedConfig:
    kind = CONFIG_MAPPING[family]
    usual, settings = kind(), {}
    for part in kind.sub_configs:
        if getattr(usual, part) is None:
            continue
        known = getattr(usual, part).to_dict()
        small = _TEXT if "text" in part else _OTHER
        settings[part] = {key: value for key, value in small.items() if key in known}
        settings[part]["model_type"] = known["model_type"]
        if "text" in part:
            settings[part] |= {"layer_types": None} if "layer_types" in known else {}
            settings[part] |= _SPECIAL.get(family, {})
    settings |= {token: 310 for token in _TOKENS if hasattr(usual, token)}
    return kind(**settings)


def multimodal_model(family: str) -> PreTrainedModel:
    torch.manual_seed(5)
    config = multimodal_config(family)
    kinds = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)
    model = next(kind for kind in kinds if type(config) in kind)[type(config)](config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()
