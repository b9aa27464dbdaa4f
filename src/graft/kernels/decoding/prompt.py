"""Prompts through a decoder of the Llama family, layer by layer, for the keys and values alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from graft.kernels.attention.ops import attention
from graft.kernels.decoding.weights import DecoderWeights, Projection
from graft.kernels.frozen.ops import linear
from graft.kernels.pointwise.ops import rms_norm, silu_gate
from graft.kernels.rounded.ops import rounded_linear

_LEAST = 17
"""Rows of a pass: a product with fewer is summed in another order, and what is computed of a prompt
must not depend on those beside it."""


def prompt_caches(
    weights: DecoderWeights, prompts: Sequence[Tensor]
) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Yield each layer's keys and values, [key_value_heads, length, head_dim] for each prompt.

    prompts: int64 [length] each, of at least one token; they are computed in one row of tokens, in
    which none sees another. The last layer's attention and everything after it is left out.
    """
    lengths = [len(prompt) for prompt in prompts]
    filler = max(0, _LEAST - sum(lengths))
    tokens = torch.cat([*prompts, torch.zeros(filler, dtype=torch.int64)])
    rows = [*lengths, *[1] * filler]
    starts = torch.tensor([0, *rows]).cumsum(0).int()
    positions = torch.cat([torch.arange(length) for length in rows])
    cosines = weights.cosines[positions, None].to(weights.dtype)
    sines = weights.sines[positions, None].to(weights.dtype)
    embedding = weights.embedding.tensors[0]
    assert embedding is not None
    hidden = embedding.index_select(0, tokens).to(weights.dtype)

    def projected(x: Tensor, projection: Projection) -> Tensor:
        """Return x Wᵀ + bias."""
        weight = projection.weight
        if weights.rounds(weight):
            y: Tensor = rounded_linear(x, weight, weights.rounding == 1)
        else:
            y = linear(x, weight)
        return y if projection.bias is None else y.add_(projection.bias)

    def heads(x: Tensor, projection: Projection, count: int) -> Tensor:
        return projected(x, projection).view(len(tokens), count, weights.head_dim)

    for number, layer in enumerate(weights.layers):
        x = rms_norm(hidden, layer.attention_norm, weights.epsilon)[0]
        keys = _turned(heads(x, layer.key, weights.key_value_heads), cosines, sines)
        values = heads(x, layer.value, weights.key_value_heads)
        keys, values = keys.transpose(0, 1), values.transpose(0, 1)
        parts = (tensor[:, : sum(lengths)].split(lengths, dim=1) for tensor in (keys, values))
        yield next(parts), next(parts)
        if number + 1 == len(weights.layers):
            return
        queries = _turned(heads(x, layer.query, weights.heads), cosines, sines).transpose(0, 1)
        scale = weights.attention_scaling
        mixed = attention(queries[None], keys[None], values[None], scale, starts)[0]
        hidden += projected(mixed.view(len(tokens), -1), layer.out)
        x = rms_norm(hidden, layer.mlp_norm, weights.epsilon)[0]
        gated = silu_gate(projected(x, layer.gate), projected(x, layer.up))
        hidden += projected(gated, layer.down)


def _turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Return x [tokens, heads, head_dim] with each head's halves turned against each other."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    turned = x * cosines
    turned[..., :half] -= second * sines[..., :half]
    turned[..., half:] += first * sines[..., half:]
    return turned
