"""A weight rounded anew to a grid: codes, range and gradients against loops in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from graft.formats.base import GridUpdate, LowRank
from graft.formats.latent import LatentFormat
from graft.formats.registry import make_format
from graft.kernels.packed.codebooks import codebook
from graft.kernels.packed.weight import plain_absmax

OUT, IN, RANK, SCALING = 6, 44, 3, 1.25
GRIDS = [("nf4", False), ("nf4", True), ("fp4", False)]


def latent(name: str, double_quant: bool, dtype: str = "float32") -> LatentFormat:
    grid = {"format": name, "double_quant": double_quant}
    latent = make_format("latent", {"grid": grid, "dtype": dtype})
    assert isinstance(latent, LatentFormat)
    return latent


def factors() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(RANK, IN) * 0.2, torch.randn(OUT, RANK) * 0.2


def by_hand(latent: LatentFormat, packed: dict, A, B) -> tuple[torch.Tensor, torch.Tensor]:
    """The rounded weight and which elements lie within the grid's range, element by element."""
    values = codebook(latent.grid.name).double().sort().values.tolist()
    nested = packed.get("absmax_scale"), packed.get("absmax_offset")
    absmax = plain_absmax(packed["absmax"], *nested).double()
    moved = packed["weight"].double() + SCALING * (B.double() @ A.double())
    rounded, within = torch.empty(OUT, IN, dtype=torch.float64), torch.empty(OUT, IN)
    for row, column in itertools.product(range(OUT), range(IN)):
        scale = absmax[(row * IN + column) // 64].item()
        steps = moved[row, column].item() / scale
        rounded[row, column] = scale * min(values, key=lambda value: abs(value - steps))
        low = values[0] - (values[1] - values[0]) / 2
        high = values[-1] + (values[-1] - values[-2]) / 2
        within[row, column] = low <= steps <= high
    return rounded, within


@pytest.mark.parametrize(("name", "double_quant"), GRIDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_an_update_rounds_to_the_nearest_value_of_the_grid(name, double_quant, dtype) -> None:
    chosen = latent(name, double_quant, dtype)
    packed, (A, B) = chosen.pack(torch.randn(OUT, IN)), factors()
    dense = dict(packed)
    if dtype == "int8":
        scales, offsets = (
            packed[f"weight_{one}"].repeat_interleave(64, 1)[:, :IN].float()
            for one in ("scales", "offsets")
        )
        dense["weight"] = packed["weight"].float() * scales + offsets
    wanted, _ = by_hand(chosen, dense, A, B)
    absorbed = chosen.absorb(packed, GridUpdate(weights=LowRank(A, B, SCALING)))
    assert absorbed is not None and absorbed.keys() == chosen.grid.storage(OUT, IN).keys()
    found = chosen.grid.unpack(absorbed, OUT, IN, torch.float32)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
    assert not torch.equal(found, chosen.unpack(packed, OUT, IN, torch.float32)), "codes flipped"


@pytest.mark.parametrize(("name", "double_quant"), GRIDS)
def test_gradients_pass_where_the_weight_lies_within_the_range(name, double_quant) -> None:
    chosen = latent(name, double_quant)
    packed = chosen.pack(torch.randn(OUT, IN))
    packed["weight"][0] *= 4  # beyond the ends
    A, B = (factor.requires_grad_() for factor in factors())
    x = torch.randn(2, 5, IN, requires_grad=True)
    grad = torch.randn(2, 5, OUT)
    y = chosen.latent_linear(x, packed, LowRank(A, B, SCALING), None, None)
    y.backward(grad)
    weight, within = by_hand(chosen, packed, A.detach(), B.detach())
    assert 0 < within.sum() < within.numel()
    torch.testing.assert_close(y.double(), x.double() @ weight.T, rtol=1e-5, atol=1e-5)
    rows, outward = x.detach().double().flatten(0, 1), grad.double().flatten(0, 1)
    passed = outward.T @ rows * within
    torch.testing.assert_close(x.grad.double(), grad.double() @ weight, rtol=1e-5, atol=1e-5)
    for found, wanted in (
        (A.grad, SCALING * B.detach().double().T @ passed),
        (B.grad, SCALING * passed @ A.detach().double().T),
    ):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "double_quant"), GRIDS)
def test_a_solvers_values_stay_with_their_codes(name, double_quant) -> None:
    """Kept in bfloat16, they round to the solver's codes again."""
    chosen = latent(name, double_quant, "bfloat16")
    weight = torch.randn(OUT, 96)
    grid = chosen.fit_grid(weight, torch.rand(96, dtype=torch.float64) + 0.1)
    codes = torch.randint(16, weight.shape, dtype=torch.uint8)
    packed = chosen.pack_codes(codes, grid, weight.double())
    solved = chosen.grid.pack_codes(codes, grid, weight)
    # FP4 has a zero of either sign.
    found, wanted = (
        chosen.grid.unpack(one, OUT, 96, torch.float32) for one in (chosen.rounded(packed), solved)
    )
    assert torch.equal(found, wanted)


def test_every_latent_format_is_read_back_from_its_description() -> None:
    for name, double_quant in GRIDS:
        chosen = latent(name, double_quant)
        assert make_format("latent", chosen.options()) == chosen
    over_int = make_format("latent", {"bits": 3, "group_size": 8})
    assert over_int.options() == {
        "bits": 3,
        "group_size": 8,
        "statistics": "float16",
        "dtype": "bfloat16",
        "rounds": True,
    }
