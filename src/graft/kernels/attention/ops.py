"""Causal attention, one operation for every backend.

Shapes: q [batch, heads, length, head_dim]; k, v [batch, kv_heads, length, head_dim], of q's dtype,
where heads is a multiple of kv_heads and head h reads kv head h / (heads / kv_heads). They may be
views that lie as [batch, length, heads, head_dim], as projections give them.

Where `starts` is given, the batch is 1 and the length is that of several sequences, one behind the
other: int32 [sequences + 1] on the CPU, from 0 to length, not falling. Sequence s has the positions
starts[s] to starts[s + 1] - 1, and is computed as it would be alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import graft.kernels.backends  # noqa: F401  (registers them)
from graft.kernels.backend.operation import Operation
from graft.kernels.backend.registry import implementation


@Operation
def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (out, lse): out = softmax(scale q kᵀ) v, where query i sees the keys 0 to i of its
    own sequence.

    out: q's dtype, [batch, length, heads, head_dim]; differentiable in q, k and v. lse: float32
    [batch, heads, length], the logarithm of the sum of e^score, for the backward pass.
    """
    compute = implementation("attention", q.device)
    out: tuple[Tensor, Tensor] = compute(q, k, v, scale, starts)
    return out


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    batch, heads, length, head_dim = q.shape
    lse = q.new_empty((batch, heads, length), dtype=torch.float32)
    return q.new_empty((batch, length, heads, head_dim)), lse


@Operation
def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v from grad, that of out (FlashAttention-2, 2307.08691).

    They have the shapes of q, k and v and lie in memory as [batch, length, heads, head_dim].
    """
    compute = implementation("attention_backward", q.device)
    grads: tuple[Tensor, Tensor, Tensor] = compute(grad, q, k, v, out, lse, scale, starts)
    return grads


@attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    starts: Tensor | None = None,
) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.transpose(1, 2).shape).transpose(1, 2) for t in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, starts = inputs
    ctx.save_for_backward(q, k, v, *output, starts)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, starts = ctx.saved_tensors
    return *attention_backward(grad, q, k, v, out, lse, ctx.scale, starts), None, None


attention.register_autograd(_backward, setup_context=_save)
