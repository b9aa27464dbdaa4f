"""Causal attention in plain PyTorch: whole matrices of scores, in float32 or wider."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from graft.kernels.backend.reference import reference


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return scale q kᵀ, -inf above the diagonal; [batch, kv_heads, group, length, length]."""
    length = q.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped: Tensor = q.to(wide).unflatten(1, (k.shape[1], -1))
    scores = scale * (grouped @ k.to(wide).unsqueeze(2).mT)
    masked = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill_(masked, -math.inf)


@reference.implements("attention")
def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute softmax(scale q kᵀ) v and the log-sum-exp of the scores."""
    if starts is not None:
        parts = [_attention(q[:, :, s], k[:, :, s], v[:, :, s], scale) for s in slices(starts)]
        return torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 2)
    return _attention(q, k, v, scale)


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, scale)
    out = scores.softmax(-1) @ v.to(scores.dtype).unsqueeze(2)
    lse = scores.logsumexp(-1).flatten(1, 2).float()
    return out.flatten(1, 2).transpose(1, 2).to(q.dtype).contiguous(), lse


@reference.implements("attention_backward")
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
    """Compute dv = pᵀ do, ds = p (do vᵀ - rowsum(do o)) scale, dq = ds k and dk = dsᵀ q."""
    whole = [slice(0, q.shape[2])] if starts is None else slices(starts)
    parts = [
        _backward(grad[:, s], q[:, :, s], k[:, :, s], v[:, :, s], out[:, s], lse[:, :, s], scale)
        for s in whole
    ]
    dq, dk, dv = (torch.cat(some, 2) for some in zip(*parts, strict=True))
    return heads_last(dq, q.dtype), heads_last(dk, q.dtype), heads_last(dv, q.dtype)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    scores = _scores(q, k, scale)
    wide, groups = scores.dtype, (k.shape[1], -1)
    p = (scores - lse.unflatten(1, groups).unsqueeze(-1)).exp_()
    do, o = (t.transpose(1, 2).to(wide).unflatten(1, groups) for t in (grad, out))
    delta = (do * o).sum(-1, keepdim=True)
    ds = p * (do @ v.to(wide).unsqueeze(2).mT - delta) * scale
    dq = (ds @ k.to(wide).unsqueeze(2)).flatten(1, 2)
    dk = (ds.mT @ q.to(wide).unflatten(1, groups)).sum(2)
    return dq, dk, (p.mT @ do).sum(2)


def slices(starts: Tensor) -> list[slice]:
    """Return the positions of each sequence."""
    places = starts.tolist()
    return [slice(begin, end) for begin, end in pairwise(places)]


def heads_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [batch, heads, length, head_dim] as it is, lying as [batch, length, heads, ..]."""
    return x.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
