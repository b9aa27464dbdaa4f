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
    rounding: int = 0
    """How inputs meet integer weights in groups of 32 or more: 1 rounded to 8 bits in blocks of 32,
    2 with one scale a token (`graft.kernels.rounded`), 0 as they are."""

    def rounds(self, weight: Weight) -> bool:
        """Return whether what meets a weight is rounded."""
        return self.rounding > 0 and decodes_rounded(weight)


def decodes_rounded(weight: Weight) -> bool:
    """Return whether rounded inputs can meet a weight: integers in groups of whole blocks of 32."""
    return weight.layout.kind == "int_group" and weight.layout.group_size % 32 == 0
