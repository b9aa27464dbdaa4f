"""The Triton kernels beside the products: moves, norms, gates, low ranks and latent weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from triton_testing import (
    DTYPES,
    ON_GPU,
    TOKENS,
    assert_is_product,
    codebook,
    randn,
    where_kernels_run,
)

from graft.formats.int_group import IntGroupFormat
from graft.formats.latent import LatentFormat
from graft.kernels.latent import reference as reference_latent
from graft.kernels.latent import triton as triton_latent
from graft.kernels.low_rank import reference as reference_low_rank
from graft.kernels.low_rank import triton as triton_low_rank
from graft.kernels.moves import reference as reference_moves
from graft.kernels.moves import triton as triton_moves
from graft.kernels.packed.weight import Latent
from graft.kernels.pointwise import reference as reference_pointwise
from graft.kernels.pointwise import triton as triton_pointwise

# statistics that move ----------------------------------------------------------------------------


@where_kernels_run
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # the interpreter's NumPy
@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_statistics_move_as_in_the_reference(stored: torch.dtype) -> None:
    offsets, A, B = randn(33, 40, dtype=stored), randn(4, 40), randn(33, 4)
    A[:, :4] *= 1e-7  # sums that float16 holds as subnormal numbers
    for scaling in (1.0, 0.7):
        ours = triton_moves.move_offsets(offsets.T.contiguous().T, A, B, scaling, stored)
        assert torch.equal(ours, reference_moves.move_offsets(offsets, A, B, scaling, stored))
    u_A, u_B = randn(6, 40), randn(33, 6)
    factors = offsets.abs().T.contiguous().T, offsets, A, B, 0.7, u_A, u_B
    both = triton_moves.move_by_factors(*factors), reference_moves.move_by_factors(*factors)
    for ours, theirs in zip(*both, strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    # So many that some lie where rounding by way of float32 would go the other way.
    values, scales = (randn(900, 33, dtype=stored) for _ in range(2))
    moves = randn(900, 33)
    values[0, 0], moves[0, 0] = 60000.0, 1e6  # overflows float16
    expected = reference_moves.move_scaled(values, scales, moves, stored)
    assert torch.equal(triton_moves.move_scaled(values, scales, moves, stored), expected)


# norms, gates and low ranks ----------------------------------------------------------------------


def assert_near(ours: Any, theirs: Any) -> None:
    """Equal but for two roundings to the dtype of numbers of this size."""
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        eps = 2 * torch.finfo(one.dtype).eps
        torch.testing.assert_close(one, other, rtol=eps, atol=eps * other.abs().max().item())


@where_kernels_run
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 40), (5, 300)])
def test_norms_and_gates(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, grad, gate, up = (randn(*shape, dtype=dtype) for _ in range(4))
    # As views lie that an adapter or a split projection hands on.
    x, grad, gate, up = (t.mT.contiguous().mT for t in (x, grad, gate, up))
    weight = randn(shape[-1], dtype=dtype)
    expected = reference_pointwise.rms_norm(x, weight, 1e-5)
    assert_near(triton_pointwise.rms_norm(x, weight, 1e-5), expected)
    both = grad, x, weight, expected[1]
    theirs = reference_pointwise.rms_norm_backward(*both)
    assert_near([triton_pointwise.rms_norm_backward(*both)], [theirs])
    assert_near([triton_pointwise.silu_gate(gate, up)], [reference_pointwise.silu_gate(gate, up)])
    theirs = reference_pointwise.silu_gate_backward(grad, gate, up)
    assert_near(triton_pointwise.silu_gate_backward(grad, gate, up), theirs)


@where_kernels_run
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("back", [False, True])
def test_rotary_positions(back: bool, dtype: torch.dtype) -> None:
    for batch, heads, keys, length, size in ((1, 1, 1, 1, 2), (2, 5, 2, 7, 24), (2, 3, 3, 4, 64)):
        # As projections write them, and as a gradient may come.
        q = randn(batch, length, heads, size, dtype=dtype).transpose(1, 2)
        k = randn(batch, size, length, keys, dtype=dtype).permute(0, 3, 2, 1)
        for rows in {1, batch}:
            cos, sin = (randn(rows, length, size, dtype=dtype) for _ in range(2))
            ours = triton_pointwise.rotary(q, k, cos, sin, back)
            theirs = reference_pointwise.rotary(q, k, cos, sin, back)
            for one, other in zip(ours, theirs, strict=True):
                assert torch.equal(one, other) and one.dtype == dtype
                assert one.transpose(1, 2).is_contiguous()


@where_kernels_run
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_pointwise, "_LOGITS", 64)
    for tokens, vocabulary in ((1, 1), (5, 37), (3, 200)):
        logits, targets = 4 * randn(tokens, vocabulary, dtype=dtype), torch.arange(tokens)
        logits[0, 1::2] = -torch.inf
        targets = (targets * 7 % vocabulary).to(logits.device)
        targets[1:2] = -100
        results = []
        for backend in (triton_pointwise, reference_pointwise):
            losses, gradient = randn(tokens), torch.empty_like(logits)
            backend.cross_entropy(logits, targets, losses, gradient, True)
            alone = torch.empty_like(losses)
            backend.cross_entropy(logits, targets, alone, None, True)
            assert torch.equal(alone, losses)
            results.append((losses, gradient))
        (losses, gradient), (expected, slope) = results
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, slope, rtol=torch.finfo(dtype).eps, atol=1e-6)
        assert not losses[1:2].any() and not gradient[1:2].any()


@where_kernels_run
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's NumPy
def test_cross_entropy_of_what_is_impossible_or_no_number() -> None:
    logits = torch.tensor([[0.0, -torch.inf], [torch.nan, 0.0], [-torch.inf, -torch.inf]])
    logits, losses = logits.to(randn(1).device), randn(3)
    targets = torch.ones(3, dtype=torch.long, device=logits.device)
    triton_pointwise.cross_entropy(logits, targets, losses, torch.empty_like(logits), False)
    assert losses[0] == torch.inf and losses[1:].isnan().all()


@where_kernels_run
@pytest.mark.parametrize(("shape", "dtype"), [((3, 4), torch.float64), ((0, 4), torch.float32)])
def test_norms_and_gates_that_no_kernel_takes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = randn(*shape, dtype=dtype), randn(4, dtype=dtype)

    def results(of: Any) -> list[Tensor]:
        y, scale = of.rms_norm(x, weight, 1e-5)
        gates = of.silu_gate(x, x), *of.silu_gate_backward(x, x, x)
        return [y, scale, of.rms_norm_backward(x, x, weight, scale), *gates]

    for one, other in zip(results(triton_pointwise), results(reference_pointwise), strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype


@where_kernels_run
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_low_rank_products(tokens: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = codebook((33, 128), "nf4", True)
    A, B, scaling = randn(4, 128), randn(33, 4), 0.7
    x, grad = randn(*tokens, 128, dtype=dtype), randn(*tokens, 33, dtype=dtype)
    for name, given in (("lora_linear", x), ("lora_grad_input", grad)):
        compute = getattr(reference_low_rank, name), getattr(triton_low_rank, name)
        exact = compute[0](given.double(), weight, A, B, scaling)
        for one, other in zip(compute[1](given, weight, A, B, scaling), exact, strict=True):
            assert one.dtype == dtype and one.shape == other.shape
            assert (one - other).abs().max() <= 16 * torch.finfo(dtype).eps * other.abs().max()
    product = triton_low_rank.token_product(grad, x)
    assert product.dtype == torch.float32
    # Without a GPU the reference computes it, which rounds the sums to the dtype.
    product = product if ON_GPU else product.to(dtype)
    assert_is_product(product, grad.reshape(-1, 33).T, x.reshape(-1, 128))


# latent weights ----------------------------------------------------------------------------------


@where_kernels_run
@pytest.mark.parametrize("kept", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("bits", "group_size", "statistics"),
    [(2, 8, "float16"), (3, 32, "float32"), (4, 32, "float16"), (8, 128, "float32")],
)
def test_latent_weights(bits: int, group_size: int, statistics: str, kept: str) -> None:
    weight_format = LatentFormat(IntGroupFormat(bits, group_size, statistics), kept)
    for rows, columns in ((5, 40), (11, 200)):
        packed = weight_format.pack(randn(rows, columns))
        grid = packed["weight"].T.contiguous().T, packed["scales"], packed["offsets"]
        update = randn(3, columns), randn(rows, 3)
        for pair, scaling in ((update, 0.7), ((None, None), 1.0)):
            latent = Latent(*grid, *pair, scaling, bits, group_size)
            both = triton_latent.latent_codes(latent), reference_latent.latent_codes(latent)
            for ours, theirs in zip(*both, strict=True):
                assert torch.equal(ours, theirs)
        product = randn(rows, columns)
        latent = Latent(*grid, *update, 0.7, bits, group_size)
        ours = triton_latent.latent_grads(product, latent)
        theirs = reference_latent.latent_grads(product, latent)
        assert torch.equal(ours[0], theirs[0])
        assert not ours[0].all()  # the update drove some weights off the grid
        torch.testing.assert_close(ours[1:], theirs[1:], rtol=1e-5, atol=1e-4)


@where_kernels_run
def test_ties_round_to_even() -> None:
    weight = torch.tensor([[0.5, 1.5, 2.5, 3.5, -0.5, -3.0, 2.49, 1e30]]).to(randn(1).device)
    scales, offsets = torch.ones_like(weight[:, :1]), torch.zeros_like(weight[:, :1])
    latent = Latent(weight, scales, offsets, None, None, 1.0, 2, 8)
    both = triton_latent.latent_codes(latent)[0], reference_latent.latent_codes(latent)[0]
    assert torch.equal(*both)
