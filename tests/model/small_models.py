"""Small models of every family that leaves attention to Transformers' interface."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from graft.model.families import FAMILIES

PLAIN = sorted(name for name, family in FAMILIES.items() if family.plain_attention)
SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


def model_of(family: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(5)
    options = SMALL | (EXPERTS if "moe" in family or family == "mixtral" else {}) | changes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
    # PyTorch's initial weights are so small that attention would be uniform.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model.eval()
