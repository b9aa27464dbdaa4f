"""The gradient of QA-LoRA's scales from rounded numbers: near, unbiased, however they are cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graft.formats.int_group import IntGroupFormat
from graft.kernels.backend import native_library
from graft.kernels.frozen import native, reference
from graft.kernels.packed.weight import Weight

pytestmark = pytest.mark.skipif(
    native_library.why_unavailable() is not None,
    reason=f"native backend: {native_library.why_unavailable()}",
)

# A short last group; rows and columns that fill no register; more tokens than fit a piece.
SHAPES = [(9, 7, 45), (67, 33, 130), (1100, 96, 256)]


def weight_of(bits: int, group_size: int, rows: int, columns: int) -> Weight:
    weight_format = IntGroupFormat(bits, group_size)
    return weight_format.kernel_weight(
        weight_format.pack(torch.randn(rows, columns)), rows, columns
    )


def inputs(tokens: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return dy and x of tokens whose sizes differ, as those of a loss do."""
    grad = torch.randn(tokens, rows) * torch.randn(tokens, 1).exp()
    return grad, torch.randn(tokens, columns) + torch.randn(columns)


def estimate(grad: Tensor, x: Tensor, weight: Weight) -> Tensor:
    return native.grad_statistics(grad, x, weight, None, rounds=True)[0]


def exact(grad: Tensor, x: Tensor, weight: Weight) -> Tensor:
    return reference.int_group_grad_statistics(grad.double(), x.double(), weight, None)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 8), (3, 32), (4, 32), (8, 64)])
def test_it_is_near_on_every_instruction_set_with_any_number_of_threads(
    level: str, bits: int, group_size: int, dtype: torch.dtype
) -> None:
    before = torch.get_num_threads()
    for sizes in SHAPES[: 2 if level == "NEON" else 3]:
        weight = weight_of(bits, group_size, *sizes[1:])
        grad, x = (one.to(dtype) for one in inputs(*sizes))
        found, right = [], exact(grad, x, weight)
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(estimate(grad, x, weight))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
        assert (found[0] - right).norm() < 0.03 * right.norm(), sizes


def test_its_errors_do_not_add_up() -> None:
    """Over 64 batches of one gradient with noise, the error falls as that of random ones does."""
    weight, signal = weight_of(4, 32, 24, 96), inputs(60, 24, 96)
    error, right = torch.zeros(24, 3), torch.zeros(24, 3)
    for _ in range(64):
        grad, x = (one + torch.randn_like(one) for one in signal)
        at_once = exact(grad, x, weight)
        difference = estimate(grad, x, weight) - at_once
        alone = difference.norm() / at_once.norm()
        error += difference
        right += at_once
    assert error.norm() / right.norm() < 0.3 * alone
    assert abs((error * right).sum() / right.square().sum()) < 2e-3


def test_padding_and_the_order_of_tokens_change_no_bit() -> None:
    """What is summed are integers, so that packed rows train as padded ones do."""
    weight, (grad, x) = weight_of(4, 32, 24, 96), inputs(37, 24, 96)
    found = estimate(grad, x, weight)
    order = torch.randperm(37)
    assert torch.equal(estimate(grad[order], x[order], weight), found)
    padding = torch.zeros(11, 24), 1000 * torch.randn(11, 96)
    padded = (torch.cat(pair) for pair in zip((grad, x), padding, strict=True))
    assert torch.equal(estimate(*padded, weight), found)


def test_a_token_far_from_the_others_does_not_drown_them() -> None:
    """The first tokens of a text have inputs of a thousand times the others' size."""
    weight, (grad, x) = weight_of(4, 32, 24, 96), inputs(200, 24, 96)
    x[0] *= 1000
    grad[0] /= 1000
    right = exact(grad, x, weight)
    assert (estimate(grad, x, weight) - right).norm() < 0.04 * right.norm()


def test_no_gradient_gives_none() -> None:
    weight, (grad, x) = weight_of(4, 32, 24, 96), inputs(20, 24, 96)
    assert not estimate(torch.zeros_like(grad), x, weight).any()
    assert not estimate(grad, torch.zeros_like(x), weight).any()


def test_tokens_of_vanishing_gradients_have_no_part_in_it() -> None:
    weight, (grad, x) = weight_of(4, 32, 24, 96), inputs(37, 24, 96)
    found = estimate(grad, x, weight)
    for size in (0.0, 1e-45, 1e-38):
        few = torch.cat([grad, torch.full((2, 24), size)])
        beside = torch.cat([x, torch.full((1, 96), 1e30), torch.randn(1, 96)])
        torch.testing.assert_close(estimate(few, beside, weight), found, rtol=0, atol=1e-4)
    assert not estimate(torch.full((4, 24), 1e-44), x[:4], weight).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(level: str, bad: float) -> None:
    """Rounded to integers a NaN would be a number like others, and a run would go on."""
    weight = weight_of(4, 32, 24, 96)
    for which in (0, 1):
        pair = inputs(20, 24, 96)
        pair[which][3, 5] = bad
        assert estimate(*pair, weight).isnan().any()


def test_a_token_that_hardly_counts_spoils_nothing() -> None:
    """The ratio of the sizes of its gradient and its inputs is beyond float32."""
    weight, (grad, x) = weight_of(4, 32, 24, 96), inputs(40, 24, 96)
    grad[3] *= 1e-39
    right = exact(grad, x, weight)
    assert (estimate(grad, x, weight) - right).norm() < 0.03 * right.norm()
