"""Tiny adapters as PEFT and mlx-lm write them, and those tools' own logits with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _foreign_models import IDS, Case, Tool, base_model, loaded, logits_of, write_tokenizer
from torch import Tensor

ADOPT = (("adopt", "theirs", "--model", "base", "--out", "ours"),)


# PEFT ---------------------------------------------------------------------------------------------


def by_peft(
    folder: Path,
    kind: str = "llama",
    tied: bool = False,
    grow: int = 0,
    pickled: bool = False,
    change: Callable[[Any], None] | None = None,
    **options: Any,
) -> Tensor:
    """Write an adapter whose every trained tensor moved."""
    from peft import LoraConfig, get_peft_model

    own = {"head_dim": 32} if kind in ("qwen3", "gemma") else {}
    base_model(folder / "base", kind, tie_word_embeddings=tied, **own)
    model = loaded(folder / "base")
    if grow:
        model.resize_token_embeddings(model.config.vocab_size + grow, mean_resizing=False)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **(settings | options)))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    adapted.eval()
    if change:
        change(adapted)
    adapted.save_pretrained(str(folder / "theirs"))
    if pickled:
        from safetensors.torch import load_file

        file = folder / "theirs" / "adapter_model.safetensors"
        torch.save(load_file(file), folder / "theirs" / "adapter_model.bin")
        file.unlink()
    if grow:
        write_tokenizer(folder / "theirs")
    return logits_of(adapted)


_PATTERNS = {
    "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 8},
    "alpha_pattern": {r"layers\.[01]\..*v_proj": 3},
}
_OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("LoRA", {}),
    ("LoRA on every linear layer", {"target_modules": "all-linear"}),
    ("rsLoRA", {"use_rslora": True, "r": 8}),
    ("DoRA", {"use_dora": True}),
    ("rank_pattern and alpha_pattern", _PATTERNS),
    ("lora_bias", {"lora_bias": True}),
    ("layers_to_transform", {"layers_to_transform": [1], "layers_pattern": "layers"}),
    ("LoRA, adapter_model.bin", {"pickled": True}),
    ("modules_to_save: embeddings and head", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ("LoRA on the head", {"target_modules": ["q_proj", "lm_head"]}),
    ("LoRA on the embeddings", {"target_modules": ["q_proj", "embed_tokens"]}),
    ("trainable_token_indices", {"trainable_token_indices": {"embed_tokens": [5, 6, 9]}}),
    (
        "trainable_token_indices, tied",
        {"trainable_token_indices": {"embed_tokens": [5, 6, 9]}, "kind": "qwen2", "tied": True},
    ),
    ("embeddings grown by 3", {"grow": 3, "modules_to_save": ["embed_tokens", "lm_head"]}),
    ("qwen3, LoRA", {"kind": "qwen3"}),
    ("gemma, LoRA", {"kind": "gemma", "tied": True}),
)
PEFT = Tool(
    ("peft",),
    [Case(name, partial(by_peft, **options), ADOPT) for name, options in _OPTIONS],
)


# mlx-lm -------------------------------------------------------------------------------------------


def by_mlx(folder: Path, fine_tune_type: str = "lora", **parameters: Any) -> Tensor:
    import mlx.core as mx
    import mlx_lm
    import numpy as np
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    base_model(folder / "base")
    file = folder / "base" / "config.json"
    settings = json.loads(file.read_text()) | {"rope_theta": 10000.0, "rope_scaling": None}
    file.write_text(json.dumps(settings))
    model, _ = mlx_lm.load(str(folder / "base"))
    model.freeze()
    options = {"rank": 4, "scale": 10.0, "dropout": 0.0} | parameters
    linear_to_lora_layers(model, 2, options, use_dora=fine_tune_type == "dora")
    mx.random.seed(0)
    moved = [
        (name, array + 0.05 * mx.random.normal(array.shape))
        for name, array in tree_flatten(model.trainable_parameters())
    ]
    model.load_weights(moved, strict=False)
    (folder / "theirs").mkdir()
    mx.save_safetensors(str(folder / "theirs" / "adapters.safetensors"), dict(moved))
    written = {
        "fine_tune_type": fine_tune_type,
        "num_layers": 2,
        "lora_parameters": options,
        "model": "base",
    }
    (folder / "theirs" / "adapter_config.json").write_text(json.dumps(written))
    model.eval()
    return torch.from_numpy(np.array(model(mx.array(IDS.numpy())).astype(mx.float32)))


MLX_ADAPTERS = Tool(
    ("mlx-lm", "mlx"),
    [
        Case("LoRA", by_mlx, ADOPT, bound=5e-3),
        Case("DoRA", partial(by_mlx, fine_tune_type="dora"), ADOPT, bound=5e-3),
        Case(
            "LoRA of named layers",
            partial(by_mlx, keys=["self_attn.q_proj", "mlp.down_proj"]),
            ADOPT,
            bound=5e-3,
        ),
    ],
)
