"""Attention by graft's own kernels, through the interface that transformers has for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from graft.kernels.attention.ops import attention
from graft.kernels.attention.reference import slices
from graft.kernels.backend.native_library import COMPUTE, why_unavailable
from graft.model.families import family_of
from graft.model.internals import attention_of

NAME = "graft"
"""Of the implementation, as `PreTrainedModel.set_attn_implementation` takes it."""


def use_own_attention(model: PreTrainedModel) -> bool:
    """Let graft's kernels compute what PyTorch's `scaled_dot_product_attention` would; say if so.

    They do for causal self-attention on a CPU, in float32 or bfloat16, without a mask, dropout or
    cached keys; anything else still goes to PyTorch's, call by call. Packed rows (see
    `graft.model.running.packing`) are computed each by itself, whichever computes them. A model is
    left as it is when its attention is not PyTorch's now, or when its family's `plain_attention` is
    not known. The model's configuration files do not change.
    """
    if attention_of(model) != "sdpa" or not may_use_own_attention(model):
        return False
    model.set_attn_implementation(NAME)
    return True


def may_use_own_attention(model: PreTrainedModel) -> bool:
    """Return whether a model, which may be one without weights, leaves attention to others."""
    # A model with code of its own may bear a known name.
    known = type(model).__module__.startswith("transformers.models.")
    return known and family_of(model.config).plain_attention


def attend(
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
    """Compute attention as `sdpa_attention_forward` does; [batch, length, heads, head_dim].

    What is said of packed rows comes as a keyword, which reaches the recomputation of a
    checkpointed layer too.
    """
    starts: Tensor | None = kwargs.pop("cu_seq_lens_q", None)
    if starts is not None or (attention_mask is not None and not attention_mask.numel()):
        attention_mask = None  # of packed or unmasked rows, of which it says nothing
    # No mask means a causal one (or none, in a module that says so): a sliding window, padding on
    # the left or packed rows come with a mask.
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    special = any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "cache"))
    plain = causal and attention_mask is None and not dropout and not special
    window = None if starts is None else _bounding(kwargs.get("sliding_window"), starts)
    if plain and window is None and _computes(query, key, value):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attention(query, key, value, float(scale), starts)[0], None
    options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
    if starts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0], None
    rows = []
    for row in slices(starts):
        q, k, v = (tensor[:, :, row] for tensor in (query, key, value))
        mask = _window(row, window, query)
        rows.append(sdpa_attention_forward(module, q, k, v, mask, **options)[0])
    return torch.cat(rows, dim=1), None


def _bounding(window: int | None, starts: Tensor) -> int | None:
    """Return the window, or None where no row is longer."""
    return None if not window or int(starts.diff().max()) <= window else window


def _window(row: slice, window: int | None, query: Tensor) -> Tensor | None:
    """Return the mask of a row that looks no further back than a window; None where it need not."""
    length = row.stop - row.start
    if window is None or length <= window:
        return None
    back = torch.arange(length, device=query.device)
    back = back[:, None] - back
    return ((back >= 0) & (back < window))[None, None]


def _computes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether the kernels take these, each [batch, heads, length, head_dim]."""
    if why_unavailable() is not None:
        return False
    one_kind = query.dtype == key.dtype == value.dtype and query.device == torch.device("cpu")
    batch, heads, length, head_dim = query.shape
    fits = key.shape == value.shape == (batch, key.shape[1], length, head_dim)
    return one_kind and query.dtype in COMPUTE and fits and heads % key.shape[1] == 0


AttentionInterface.register(NAME, attend)
# The same masks as PyTorch's: none where a causal one says it all.
AttentionMaskInterface.register(NAME, sdpa_mask)
