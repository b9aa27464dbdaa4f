"""Causal attention against a softmax written out in float64, on every instruction set."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from graft.kernels.attention import native as native_attention
from graft.kernels.attention import ops as attention_ops
from graft.kernels.attention import reference as reference_attention
from graft.kernels.backend import native_library

DTYPES = [torch.float32, torch.bfloat16]
NATIVE = pytest.mark.skipif(
    native_library.why_unavailable() is not None,
    reason=f"native backend: {native_library.why_unavailable()}",
)
# batch, heads, kv heads, length, head_dim: one key, less than a vector, whole blocks, ragged ends,
# an odd head_dim, more keys than the backward pass meets at once.
SHAPES = [
    (2, 4, 2, 1, 16),
    (1, 4, 1, 7, 64),
    (3, 2, 2, 64, 80),
    (2, 6, 2, 130, 32),
    (1, 2, 1, 51, 33),
    (1, 2, 1, 301, 128),
]
Forward = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]


def vectors(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v as views of [batch, length, heads, head_dim], as a model passes them."""
    batch, heads, kv_heads, length, head_dim = shape
    q, k, v = (
        torch.randn(batch, length, count, head_dim).to(dtype).transpose(1, 2)
        for count in (heads, kv_heads, kv_heads)
    )
    return q, k, v


def exact(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return out [batch, length, heads, head_dim], log-sum-exp and the three gradients, float64."""
    leaves = [t.detach().double().requires_grad_() for t in (q, k, v)]
    q64, k64, v64 = leaves
    batch, heads, length, _ = q.shape
    rows, sums = [], []
    for head in range(heads):
        kv_head = head * k.shape[1] // heads
        scores = scale * q64[:, head] @ k64[:, kv_head].transpose(1, 2)
        seen = torch.arange(length)[:, None] >= torch.arange(length)
        weights = scores.exp() * seen
        total = weights.sum(-1)
        rows.append((weights / total[..., None]) @ v64[:, kv_head])
        sums.append(total.log())
    out = torch.stack(rows, dim=2)
    gradients = torch.autograd.grad(out, leaves, grad.double())
    return out.detach(), torch.stack(sums, dim=1).detach(), list(gradients)


def assert_near(got: Tensor, expected: Tensor, largest: float, tolerance: float) -> None:
    assert got.shape == expected.shape
    assert (got.double() - expected).abs().max().item() <= tolerance * largest


def check(forward: Forward, backward: Backward, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = vectors(shape, dtype)
    scale = 0.9 / math.sqrt(shape[-1])
    out, lse = forward(q, k, v, scale)
    grad = torch.randn(out.shape).to(dtype)
    expected, log_sums, gradients = exact(q, k, v, grad, scale)
    tolerance = 2e-6 if dtype == torch.float32 else 8e-3
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_near(out, expected, expected.abs().max().item(), tolerance)
    assert_near(lse, log_sums, max(1.0, log_sums.abs().max().item()), 1e-6)
    # dq and dk are differences of numbers as large as dv: they vanish for one key.
    largest = gradients[2].abs().max().item()
    for got, wanted in zip(backward(grad, q, k, v, out, lse, scale), gradients, strict=True):
        assert got.dtype == dtype
        assert_near(got, wanted, largest, tolerance)


@NATIVE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_attention_equals_float64(
    level: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    check(native_attention.attention, native_attention.attention_backward, shape, dtype)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_equals_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(reference_attention.attention, reference_attention.attention_backward, shape, dtype)


@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_the_operation_is_differentiable(shape: tuple[int, ...]) -> None:
    q, k, v = (t.requires_grad_() for t in vectors(shape, torch.float32))
    out, lse = attention_ops.attention(q, k, v, 0.2)
    assert out.requires_grad and not lse.requires_grad
    grad = torch.randn_like(out)
    out.backward(grad)
    expected, _, gradients = exact(q, k, v, grad, 0.2)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for leaf, wanted in zip((q, k, v), gradients, strict=True):
        torch.testing.assert_close(leaf.grad.double(), wanted, rtol=1e-4, atol=2e-5)


@NATIVE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_neither_overflow_nor_lose_the_row(level: str, dtype: torch.dtype) -> None:
    """Scores of hundreds: a row is all but one-hot, and e^-200 is nothing."""
    q, k, v = vectors((1, 2, 2, 40, 16), dtype)
    q, k = q * 20, k * 20
    grad = torch.randn(1, 40, 2, 16).to(dtype)
    out, lse = native_attention.attention(q, k, v, 0.25)
    wide = (0.25 * q.double() @ k.double().mT).masked_fill(
        torch.ones(40, 40).triu(1).bool(), -math.inf
    )
    assert wide.amax() > 200
    expected = (wide.softmax(-1) @ v.double()).transpose(1, 2)
    assert_near(out, expected, v.abs().max().item(), 1e-4 if dtype == torch.float32 else 8e-3)
    torch.testing.assert_close(lse.double(), wide.logsumexp(-1), rtol=1e-6, atol=0)
    for gradient in native_attention.attention_backward(grad, q, k, v, out, lse, 0.25):
        assert gradient.isfinite().all()


@NATIVE
def test_what_is_not_finite_stays_in_the_rows_that_see_it(level: str) -> None:
    q, k, v = vectors((1, 1, 1, 60, 16), torch.bfloat16)
    k = k.clone()
    k[0, 0, 35, 3] = math.nan
    out, _ = native_attention.attention(q, k, v, 0.25)
    assert out[0, :35].isfinite().all()
    assert out[0, 35:].isnan().all()


@NATIVE
def test_a_later_token_changes_no_earlier_row(level: str) -> None:
    for dtype in DTYPES:
        q, k, v = vectors((1, 2, 1, 75, 24), dtype)
        out, lse = native_attention.attention(q, k, v, 0.2)
        shorter = [t[:, :, :44] for t in (q, k, v)]
        other, other_lse = native_attention.attention(*shorter, 0.2)
        assert torch.equal(out[:, :44], other)
        assert torch.equal(lse[..., :44], other_lse)


@NATIVE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_depend_neither_on_threads_nor_on_how_the_vectors_lie(dtype: torch.dtype) -> None:
    # Heads that share keys are summed in parts: 8 of them here, and 1 where there are 16 kv heads.
    for shape in ((1, 16, 2, 70, 16), (4, 8, 4, 30, 16)):
        q, k, v = vectors(shape, dtype)
        grad = torch.randn(shape[0], shape[3], shape[1], shape[4]).to(dtype)
        dense = tuple(t.contiguous() for t in (q, k, v))
        apart = tuple(t.mT.contiguous().mT for t in (q, k, v))  # not contiguous along head_dim
        before, found = torch.get_num_threads(), []
        try:
            for threads, inputs in ((1, (q, k, v)), (2, (q, k, v)), (3, dense), (1, apart)):
                torch.set_num_threads(threads)
                out, lse = native_attention.attention(*inputs, 0.2)
                arguments = grad, *inputs, out, lse, 0.2
                found.append((out, lse, *native_attention.attention_backward(*arguments)))
        finally:
            torch.set_num_threads(before)
        for others in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@NATIVE
def test_dtypes_that_the_kernels_do_not_multiply_go_to_the_reference() -> None:
    q, k, v = vectors((1, 2, 1, 9, 8), torch.float64)
    out, lse = native_attention.attention(q, k, v, 0.3)
    grad = torch.randn_like(out)
    expected, _, gradients = exact(q, k, v, grad, 0.3)
    torch.testing.assert_close(out, expected)
    got = native_attention.attention_backward(grad, q, k, v, out, lse, 0.3)
    for gradient, wanted in zip(got, gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)  # lse is float32


def test_opcheck(opcheck: Callable[..., None]) -> None:
    for dtype in DTYPES:
        q, k, v = (t.requires_grad_() for t in vectors((2, 4, 2, 11, 8), dtype))
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        opcheck(attention_ops.attention, (q, k, v, 0.3), test_utils=tests)
        out, lse = attention_ops.attention(q.detach(), k.detach(), v.detach(), 0.3)
        frozen = q.detach(), k.detach(), v.detach()
        grad = torch.randn_like(out)
        opcheck(attention_ops.attention_backward, (grad, *frozen, out, lse, 0.3), test_utils=tests)
    q, k, v = (t.requires_grad_() for t in vectors((1, 2, 1, 5, 8), torch.float32))
    opcheck(attention_ops.attention, (q, k, v, 0.3))


def test_no_tokens_give_no_output() -> None:
    q, k, v = vectors((1, 2, 1, 0, 8), torch.float32)
    out, lse = attention_ops.attention(q, k, v, 1.0)
    assert out.shape == (1, 0, 2, 8) and lse.shape == (1, 2, 0)
