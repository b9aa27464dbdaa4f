"""Causal attention against a softmax written out in float64, on every instruction set."""

from __future__ import annotations

import itertools
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
Forward = Callable[..., tuple[Tensor, Tensor]]
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


# Packed sequences ---------------------------------------------------------------------------------

PACKED = [
    (1, (1, 7, 64, 33, 0, 130, 51, 2), 4, 2, 40),  # heads in parts, a sequence without a token
    (2, (23, 9), 6, 1, 32),
    (3, (300, 5, 17) * 6, 4, 4, 16),
]


def packed(case: tuple, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return q, k, v, a gradient and where the sequences start."""
    _, lengths, heads, kv_heads, head_dim = case
    total = sum(lengths)
    q, k, v = vectors((1, heads, kv_heads, total, head_dim), dtype)
    grad = torch.randn(1, total, heads, head_dim).to(dtype)
    return q, k, v, grad, torch.tensor([0, *lengths]).cumsum(0).int()


def alone(starts: Tensor) -> list[slice]:
    places = starts.tolist()
    return [slice(begin, end) for begin, end in itertools.pairwise(places) if begin < end]


def check_packed(forward: Forward, backward: Backward, case: tuple, dtype: torch.dtype) -> None:
    """Each sequence as float64 has it alone."""
    q, k, v, grad, starts = packed(case, dtype)
    scale = 0.9 / math.sqrt(q.shape[-1])
    out, lse = forward(q, k, v, scale, starts)
    gradients = backward(grad, q, k, v, out, lse, scale, starts)
    tolerance = 3e-6 if dtype == torch.float32 else 9e-3
    for part in alone(starts):
        q1, k1, v1 = (t[:, :, part] for t in (q, k, v))
        expected, log_sums, wanted = exact(q1, k1, v1, grad[:, part], scale)
        assert_near(out[:, part], expected, expected.abs().max().item(), tolerance)
        assert_near(lse[:, :, part], log_sums, max(1.0, log_sums.abs().max().item()), 1e-6)
        largest = wanted[2].abs().max().item()
        for got, one in zip(gradients, wanted, strict=True):
            assert_near(got[:, :, part], one, largest, tolerance)


@NATIVE
@pytest.mark.parametrize("case", PACKED, ids=lambda case: str(case[0]))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_packed_sequences_equal_float64(level: str, case: tuple, dtype: torch.dtype) -> None:
    check_packed(native_attention.attention, native_attention.attention_backward, case, dtype)


@pytest.mark.parametrize("case", PACKED[:2], ids=lambda case: str(case[0]))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_of_packed_sequences_equals_float64(case: tuple, dtype: torch.dtype) -> None:
    check_packed(reference_attention.attention, reference_attention.attention_backward, case, dtype)


@NATIVE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_sequences_are_a_batch_of_them_bit_for_bit(level: str, dtype: torch.dtype) -> None:
    lengths = (31, 4, 77)
    q, k, v, grad, starts = packed((0, lengths, 8, 2, 24), dtype)
    padded = [torch.zeros(3, t.shape[1], 77, 24, dtype=dtype) for t in (q, k, v)]
    padded_grad = torch.zeros(3, 77, 8, 24, dtype=dtype)
    for row, part in enumerate(alone(starts)):
        for to, t in zip(padded, (q, k, v), strict=True):
            to[row, :, : lengths[row]] = t[0, :, part]
        padded_grad[row, : lengths[row]] = grad[0, part]
    out, lse = native_attention.attention(q, k, v, 0.2, starts)
    wide, wide_lse = native_attention.attention(*padded, 0.2)
    gradients = native_attention.attention_backward(grad, q, k, v, out, lse, 0.2, starts)
    expected = native_attention.attention_backward(padded_grad, *padded, wide, wide_lse, 0.2)
    for row, part in enumerate(alone(starts)):
        assert torch.equal(out[0, part], wide[row, : lengths[row]])
        for got, wanted in zip(gradients, expected, strict=True):
            assert torch.equal(got[0, :, part], wanted[row, :, : lengths[row]])


@NATIVE
def test_no_sequence_sees_another_bit_for_bit(level: str) -> None:
    q, k, v, _, starts = packed(PACKED[0], torch.bfloat16)
    out, _ = native_attention.attention(q, k, v, 0.2, starts)
    begin, end = starts[2:4].tolist()
    others = torch.ones(q.shape[2], dtype=torch.bool)
    others[begin:end] = False
    for t in (q, k, v):
        t[:, :, begin:end] = math.nan
    again, _ = native_attention.attention(q, k, v, 0.2, starts)
    assert torch.equal(out[:, others], again[:, others])
    assert again[:, begin:end].isnan().all()


@NATIVE
@pytest.mark.parametrize("starts", [[0, 5], [1, 9], [0, 7, 4, 9], [], [0, 4, 12]])
def test_starts_that_do_not_part_the_positions_are_refused(starts: list[int]) -> None:
    q, k, v = vectors((1, 2, 1, 9, 8), torch.float32)
    with pytest.raises(ValueError, match="do not part 1 x 9 positions"):
        native_attention.attention(q, k, v, 0.3, torch.tensor(starts, dtype=torch.int32))
    two = [t.expand(2, -1, -1, -1) for t in (q, k, v)]
    with pytest.raises(ValueError, match="do not part 2 x 9 positions"):
        native_attention.attention(*two, 0.3, torch.tensor([0, 9], dtype=torch.int32))


def test_opcheck_of_packed_sequences(opcheck: Callable[..., None]) -> None:
    for dtype in DTYPES:
        q, k, v, grad, starts = packed((0, (3, 8), 4, 2, 8), dtype)
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        opcheck(attention_ops.attention, (*leaves, 0.3, starts), test_utils=tests)
        out, lse = attention_ops.attention(q, k, v, 0.3, starts)
        arguments = (grad, q, k, v, out, lse, 0.3, starts)
        opcheck(attention_ops.attention_backward, arguments, test_utils=tests)


def test_no_tokens_give_no_output() -> None:
    q, k, v = vectors((1, 2, 1, 0, 8), torch.float32)
    out, lse = attention_ops.attention(q, k, v, 1.0)
    assert out.shape == (1, 0, 2, 8) and lse.shape == (1, 2, 0)
