"""Attention whose queries and keys are rotated by graft's own kernel, one launch for both."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from graft.adapters.attach import replace_module
from graft.kernels.backend.registry import backend_of
from graft.kernels.pointwise.ops import rotary
from graft.model.families import FAMILIES, Family, family_of, is_class
from graft.model.internals import attention_of
from graft.model.running.attention import NAME, attend


class RotaryAttention(nn.Module):
    """y = o_proj(attention(rotary(q_proj(x)), rotary(k_proj(x)), v_proj(x))), by Llama's names."""

    def __init__(self, attention: Any, family: Family) -> None:
        super().__init__()
        # Its modules and settings are Transformers' own, which our attention reads.
        self.__dict__.update(attention.__dict__)
        window = getattr(attention.config, "sliding_window", None) if family.windowed else None
        self.window: int | None = getattr(attention, "sliding_window", window)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Return y [batch, length, hidden] in x's dtype, and no weights."""
        own: Any = self
        rows = hidden_states.shape[:-1]
        q, k, v = (
            project(hidden_states).view(*rows, -1, own.head_dim)
            for project in (own.q_proj, own.k_proj, own.v_proj)
        )
        if hasattr(self, "q_norm"):
            q, k = own.q_norm(q), own.k_norm(k)
        q, k, v = (states.transpose(1, 2) for states in (q, k, v))
        q, k = rotary(q, k, *position_embeddings, False)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, own.layer_idx)
        dropout = own.attention_dropout if self.training else 0.0
        options = {"scaling": own.scaling, "sliding_window": self.window, **kwargs}
        output, _ = attend(self, q, k, v, attention_mask, dropout, **options)
        return own.o_proj(output.reshape(*rows, -1)), None


def use_own_rotary(model: PreTrainedModel) -> int:
    """Let graft's kernel rotate queries and keys; return how many modules it does so for.

    Parameters keep their names. Attention stays as it is where it is not graft's own, where no
    family names its class, and on a device without a kernel for it.
    """
    if attention_of(model) != NAME or backend_of("rotary", model.device).name == "reference":
        return 0
    return replace_attention(model)


def replace_attention(model: PreTrainedModel) -> int:
    """Replace the attention modules, whatever computes on the model's device."""
    classes = {family.attention for family in FAMILIES.values()} - {""}
    names = [name for name, module in model.named_modules() if is_class(module, classes)]
    for name in names:
        attention = RotaryAttention(model.get_submodule(name), family_of(model.config))
        replace_module(model, name, attention)
    return len(names)
