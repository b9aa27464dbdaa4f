"""Causal attention by the native kernels (csrc/attention.inc); other dtypes go to the reference.

Products are in bfloat16 (summed in float32) or in float32, the softmax is in float32. The length is
not limited; beyond about 8192 tokens the scores of a block of queries leave the core's own cache.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from graft.kernels.attention import reference
from graft.kernels.backend.native_library import COMPUTE, DTYPES, address, call, native

_int = ctypes.c_int64


class _Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, _int) for name in ("batch", "head", "row"))]


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, _int) for name in ("batch", "heads", "kv_heads", "length", "head_dim")),
        ("sequences", _int),
        ("starts", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        *((name, _Rows) for name in ("q", "k", "v", "out")),
        ("lse", ctypes.c_void_p),
        *((name, _Rows) for name in ("grad_out", "grad_q", "grad_k", "grad_v")),
    ]


def _rows(tensor: Tensor) -> _Rows:
    """Return where the vectors of a tensor [batch, heads, length, head_dim] lie."""
    return _Rows(address(tensor), *tensor.stride()[:3])


def _readable(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _task(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    starts: Tensor | None,
) -> _Call:
    batch, heads, length, head_dim = q.shape
    task = _Call(batch, heads, k.shape[1], length, head_dim)
    if starts is not None:
        task.sequences, task.starts = starts.numel() - 1, address(starts)
    task.scale = scale
    task.q, task.k, task.v, task.out = _rows(q), _rows(k), _rows(v), _rows(out.transpose(1, 2))
    task.lse = address(lse)
    return task


def _checked(starts: Tensor | None, q: Tensor) -> Tensor | None:
    """Return the starts as the kernels, which trust them, read them."""
    if starts is None:
        return None
    places = starts.tolist()
    right = places[:1] == [0] and places[-1] == q.shape[2] and places == sorted(places)
    if q.shape[0] != 1 or starts.dtype != torch.int32 or starts.dim() != 1 or not right:
        raise ValueError(
            f"the starts {places} do not part {q.shape[0]} x {q.shape[2]} positions into sequences"
        )
    return starts.contiguous()


def _computes(q: Tensor, *others: Tensor) -> bool:
    return q.dtype in COMPUTE and all(other.dtype == q.dtype for other in others)


@native.implements("attention")
def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute softmax(scale q kᵀ) v and the log-sum-exp of the scores."""
    starts = _checked(starts, q)
    if not _computes(q, k, v):
        plain: tuple[Tensor, Tensor] = reference.attention(q, k, v, scale, starts)
        return plain
    batch, heads, length, head_dim = q.shape
    q, k, v = (_readable(tensor) for tensor in (q, k, v))
    out = q.new_empty((batch, length, heads, head_dim))
    lse = q.new_empty((batch, heads, length), dtype=torch.float32)
    if out.numel():
        task = _task(q, k, v, out, lse, scale, starts)
        call("attention", DTYPES[q.dtype], ctypes.byref(task))
    return out, lse


@native.implements("attention_backward")
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
    """Compute the gradients of q, k and v, each lying as [batch, length, heads, head_dim]."""
    starts = _checked(starts, q)
    if not _computes(q, k, v, grad, out):
        found: tuple[Tensor, Tensor, Tensor]
        found = reference.attention_backward(grad, q, k, v, out, lse, scale, starts)
        return found
    q, k, v, grad, out = (_readable(tensor) for tensor in (q, k, v, grad, out))
    lse = lse.contiguous()
    grads = [_empty_heads_last(tensor) for tensor in (q, k, v)]
    if out.numel():
        task = _task(q, k, v, out, lse, scale, starts)
        task.grad_out = _rows(grad.transpose(1, 2))
        task.grad_q, task.grad_k, task.grad_v = (_rows(tensor) for tensor in grads)
        call("attention_backward", DTYPES[q.dtype], ctypes.byref(task))
    return grads[0], grads[1], grads[2]


def _empty_heads_last(x: Tensor) -> Tensor:
    batch, heads, length, head_dim = x.shape
    return x.new_empty((batch, length, heads, head_dim)).transpose(1, 2)
