"""Attention by graft's own kernels, through the interface that transformers has for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from graft.kernels.attention.ops import attention
from graft.kernels.backend.native_library import COMPUTE, why_unavailable
from graft.model.families import family_of
from graft.model.internals import attention_of

NAME = "graft"
"""Of the implementation, as `PreTrainedModel.set_attn_implementation` takes it."""


def use_own_attention(model: PreTrainedModel) -> bool:
    """Let graft's kernels compute what PyTorch's `scaled_dot_product_attention` would; say if so.

    They do for causal self-attention on a CPU, in float32 or bfloat16, without a mask, dropout or
    cached keys; anything else still goes to PyTorch's, call by call. A model is left as it is when
    its attention is not PyTorch's now, when its family's `plain_attention` is not known, or when
    there is no native backend. The model's configuration files do not change.
    """
    known = family_of(model.config).plain_attention
    # A model with code of its own may bear a known name.
    known = known and type(model).__module__.startswith("transformers.models.")
    if not known or attention_of(model) != "sdpa" or why_unavailable() is not None:
        return False
    model.set_attn_implementation(NAME)
    return True


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention as `sdpa_attention_forward` does; [batch, length, heads, head_dim]."""
    # No mask means a causal one (or none, in a module that says so): a sliding window, padding on
    # the left or packed rows come with a mask.
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    special = any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "cache"))
    plain = causal and attention_mask is None and not dropout and not special
    if plain and _computes(query, key, value):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attention(query, key, value, float(scale))[0], None
    out, _ = sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **kwargs,
    )
    return out, None


def _computes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether the kernels take these, each [batch, heads, length, head_dim]."""
    one_kind = query.dtype == key.dtype == value.dtype and query.device == torch.device("cpu")
    batch, heads, length, head_dim = query.shape
    fits = key.shape == value.shape == (batch, key.shape[1], length, head_dim)
    return one_kind and query.dtype in COMPUTE and fits and heads % key.shape[1] == 0


AttentionInterface.register(NAME, _attention)
# The same masks as PyTorch's: none where a causal one says it all.
AttentionMaskInterface.register(NAME, sdpa_mask)
