"""A decoder of the Llama family as the kernels see it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graft.kernels.packed.weight import Weight


@dataclass(frozen=True)
class Projection:
    """y = x Wᵀ + bias."""

    weight: Weight
    bias: Tensor | None = None


@dataclass(frozen=True)
class DecoderLayer:
    """The weights of a layer, in the order of graft_decoder_layer."""

    attention_norm: Tensor
    mlp_norm: Tensor
    query: Projection
    key: Projection
    value: Projection
    out: Projection
    gate: Projection
    up: Projection
    down: Projection


@dataclass(frozen=True)
class DecoderWeights:
    """A decoder with RMSNorm, rotary positions and SiLU that computes in `dtype`.

    h += out(attention(norm(h))); h += down(silu(gate(norm(h))) * up(norm(h))); logits =
    head(norm(h)). `cosines` and `sines` [positions, head_dim] turn the two halves of a head against
    each other; as many positions can be decoded.
    """

    dtype: torch.dtype
    layers: tuple[DecoderLayer, ...]
    heads: int
    key_value_heads: int
    head_dim: int
    epsilon: float
    attention_scaling: float
    embedding: Weight
    norm: Tensor
    head: Projection
    cosines: Tensor
    sines: Tensor

    def meet_rounded_inputs(self) -> bool:
        """Return whether any layer's weight is integer codes in groups of whole blocks of 32."""
        layouts = (
            part.weight.layout
            for layer in self.layers
            for part in vars(layer).values()
            if isinstance(part, Projection)
        )
        return any(one.kind == "int_group" and one.group_size % 32 == 0 for one in layouts)
