"""The latent weight's operations: the same codes from every backend, gradients by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from graft.formats.base import GridUpdate, LowRank, Scaled
from graft.formats.int_group import IntGroupFormat
from graft.formats.latent import LatentFormat
from graft.kernels.frozen.ops import linear
from graft.kernels.latent import native as native_latent
from graft.kernels.latent import ops
from graft.kernels.latent import reference as reference_latent
from graft.kernels.packed.planes import unpack_codes
from graft.kernels.packed.weight import Latent, dense_weight

OUT, RANK, SCALING = 22, 3, 0.75
GRIDS = [(2, 8), (3, 32), (4, 32), (8, 64)]


def latent(weight_format: LatentFormat, columns: int) -> tuple[Tensor, ...]:
    """A weight of which some lies outside its grid, the grid, and a low-rank update."""
    packed = weight_format.pack(torch.randn(OUT, columns))
    A, B = torch.randn(RANK, columns), torch.randn(OUT, RANK)
    return packed["weight"], packed["scales"], packed["offsets"], A, B


@pytest.mark.parametrize("statistics", ["float16", "float32"])
@pytest.mark.parametrize(("bits", "group_size"), GRIDS)
@pytest.mark.parametrize("columns", [40, 96, 200])
def test_native_codes_and_gradients_equal_the_references(
    level: str, bits: int, group_size: int, columns: int, statistics: str
) -> None:
    for dtype in ("bfloat16", "float32"):
        weight_format = LatentFormat(IntGroupFormat(bits, group_size, statistics), dtype)
        *weight, A, B = latent(weight_format, columns)
        for update in ((A, B), (None, None)):
            arguments = Latent(*weight, *update, SCALING, bits, group_size)
            got = native_latent.latent_codes(arguments)
            expected = reference_latent.latent_codes(arguments)
            assert len(got) == len(expected) == (2 if bits == 3 else 1)
            assert all(map(torch.equal, got, expected))
        product = torch.randn(OUT, columns)
        arguments = product, Latent(*weight, A, B, SCALING, bits, group_size)
        got, expected = (
            backend.latent_grads(*arguments) for backend in (native_latent, reference_latent)
        )
        assert torch.equal(got[0], expected[0])
        assert not got[0].all()  # the update drove some weights off the grid
        torch.testing.assert_close(got[1:], expected[1:], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("bits", "group_size"), GRIDS)
def test_latent_linear_computes_with_the_weight_that_is_merged(bits: int, group_size: int) -> None:
    weight_format = LatentFormat(IntGroupFormat(bits, group_size))
    weight, scales, offsets, A, B = latent(weight_format, 96)
    u, v = (torch.randn(scales.shape) * 0.1 for _ in range(2))
    x = torch.randn(5, 96)
    y = ops.latent_linear(
        x, dense_weight(weight), scales, offsets, A, B, SCALING, u, v, bits, group_size
    )
    packed = {"weight": weight, "scales": scales, "offsets": offsets}
    update = GridUpdate(Scaled(u), Scaled(v), LowRank(A, B, SCALING))
    merged = weight_format.absorb(packed, update)
    assert merged is not None
    merged_weight = weight_format.deployed.kernel_weight(merged, OUT, 96)
    assert torch.equal(y, linear(x, merged_weight))

    # The same by hand, in float64 but for the codes.
    group = torch.arange(96) // group_size
    moved = weight.double() + SCALING * (B.double() @ A.double())
    grid = scales.double()[:, group], offsets.double()[:, group]
    codes = ((moved - grid[1]) / grid[0]).round().clamp(0, 2**bits - 1)
    high = (merged["codes_high"],) if bits == 3 else ()
    found = unpack_codes((merged["codes"], *high), bits, 96)
    assert (found != codes).float().mean() < 1e-3  # float32 may break a near-tie the other way
    dense = grid[0] * (1 + u.double()[:, group]) * found
    dense += grid[1] + grid[0] * v.double()[:, group]
    # The moved scales are rounded to float16, 2^-11 of a weight of up to 2^bits steps.
    bound = x.abs().double() @ dense.abs().T + x.abs().double() @ (grid[0].T * 2**bits)
    assert ((y.double() - x.double() @ dense.T).abs() <= bound * 2**-11).all()


@pytest.mark.parametrize(("bits", "group_size"), GRIDS)
def test_gradients_pass_straight_through_the_roundings(bits: int, group_size: int) -> None:
    weight, scales, offsets, A, B = latent(LatentFormat(IntGroupFormat(bits, group_size)), 96)
    u, v = (torch.randn(scales.shape) * 0.1 for _ in range(2))
    trained = [t.requires_grad_() for t in (torch.randn(5, 96), A, B, u, v)]
    x = trained[0]
    y = ops.latent_linear(
        x, dense_weight(weight), scales, offsets, A, B, SCALING, u, v, bits, group_size
    )
    grad = torch.randn_like(y)
    y.backward(grad)

    group = torch.arange(96) // group_size
    exact = [t.detach().double().requires_grad_() for t in trained]
    x64, A64, B64, u64, v64 = exact
    moved = weight.double() + SCALING * (B64 @ A64)
    step, offset = scales.double()[:, group], offsets.double()[:, group]
    packed = {"weight": weight, "scales": scales, "offsets": offsets}
    update = GridUpdate(weights=LowRank(A.detach(), B.detach(), SCALING))
    merged = LatentFormat(IntGroupFormat(bits, group_size)).absorb(packed, update)
    assert merged is not None
    high = (merged["codes_high"],) if bits == 3 else ()
    codes = unpack_codes((merged["codes"], *high), bits, 96).double()
    rounded = ((moved.detach() - offset) / step).round()
    inside = (rounded >= 0) & (rounded <= 2**bits - 1)
    # Values of the rounded weight; gradients of the latent one within the range, and of u and v.
    through = (moved - moved.detach()) * inside
    dense = step * (1 + u64[:, group]) * codes + offset + step * v64[:, group] + through
    (x64 @ dense.T).backward(grad.double())
    for got, expected in zip(trained, exact, strict=True):
        assert got.grad is not None and got.grad.dtype == torch.float32
        torch.testing.assert_close(got.grad.double(), expected.grad, rtol=5e-3, atol=2e-2)


def test_opcheck(opcheck: Callable[..., None]) -> None:
    weight, scales, offsets, A, B = latent(LatentFormat(), 96)
    u, v = (torch.zeros(scales.shape, requires_grad=True) for _ in range(2))
    x = torch.randn(2, 3, 96, requires_grad=True)
    grid = weight, scales, offsets
    opcheck(ops.latent_codes, (*grid, A, B, SCALING, 4, 32))
    opcheck(ops.latent_codes, (*grid, None, None, 1.0, 3, 32))
    opcheck(ops.latent_grads, (torch.randn(OUT, 96), *grid, A, B, SCALING, 4, 32))
    factors = A.requires_grad_(), B.requires_grad_()
    rest = *factors, SCALING, u, v, 4, 32
    opcheck(ops.latent_linear, (x, dense_weight(weight), *grid[1:], *rest))
    in_8_bits = LatentFormat(dtype="int8")
    packed = in_8_bits.pack(weight.float())
    kept = in_8_bits.kept_weight(packed)
    opcheck(ops.latent_linear, (x, kept, packed["scales"], packed["offsets"], *rest))


def test_a_grid_that_stays_is_one_that_moves_by_nothing() -> None:
    weight, scales, offsets, A, B = latent(LatentFormat(), 96)
    found = []
    for moves in ((None, None), [torch.zeros(scales.shape, requires_grad=True) for _ in range(2)]):
        trained = [t.detach().clone().requires_grad_() for t in (torch.ones(5, 96), A, B)]
        x, *factors = trained
        y = ops.latent_linear(
            x, dense_weight(weight), scales, offsets, *factors, SCALING, *moves, 4, 32
        )
        y.square().sum().backward()
        found.append([y, *(tensor.grad for tensor in trained)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
