from __future__ import annotations

import pytest
import torch

from graft.errors import GraftError
from graft.formats.base import GridUpdate
from graft.formats.int_group import IntGroupFormat
from graft.formats.registry import make_format


def plain_values(weight: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """Round to nearest, element by element in float64, from min and max of each group."""
    out = torch.zeros(weight.shape, dtype=torch.float64)
    levels = 2**bits - 1
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group_size):
            group = weight[row, start : start + group_size].double()
            offset = group.min().half().double()
            scale = ((group.max() - offset) / levels).clamp(min=2.0**-20).half().double()
            for j, value in enumerate(group):
                code = min(max(round(float((value - offset) / scale)), 0), levels)
                out[row, start + j] = scale * code + offset
    return out


@pytest.mark.parametrize("in_features", [5, 43, 64, 172])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_values_equal_a_plain_float64_loop(bits: int, in_features: int) -> None:
    weight = torch.randn(3, in_features) * 0.1
    for group_size in (8, 32, 128):
        weight_format = IntGroupFormat(bits=bits, group_size=group_size)
        dense = weight_format.unpack(weight_format.pack(weight), 3, in_features, torch.float32)
        expected = plain_values(weight, bits, group_size)
        torch.testing.assert_close(dense.double(), expected, rtol=0, atol=1e-7)


def test_a_short_last_group_does_not_look_at_its_filler() -> None:
    weight_format = IntGroupFormat(bits=4, group_size=32)
    weight = torch.rand(4, 37) + 5  # zeros as filler would stretch the last group to [0, 6]
    packed = weight_format.pack(weight)
    assert bool((packed["offsets"][:, 1].float() >= weight[:, 32:].amin(1) * (1 - 2**-10)).all())
    assert bool((packed["scales"][:, 1].float() <= 1.01 / 15).all())


def test_a_large_weight_is_packed_in_pieces_with_the_same_result() -> None:
    weight = torch.randn(3, (1 << 22) - 5)[:, : 1 << 21]
    weight_format = IntGroupFormat(bits=2, group_size=128)
    packed = weight_format.pack(weight)
    for row in range(3):
        alone = weight_format.pack(weight[row : row + 1])
        assert all(torch.equal(packed[name][row], alone[name][0]) for name in packed)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -1e5, 2e6])
def test_a_weight_beyond_the_statistics_is_refused(bad: float) -> None:
    weight = torch.randn(4, 64)
    weight[2, 40] = bad
    with pytest.raises(GraftError, match="not finite"):
        IntGroupFormat().pack(weight)


def test_float32_statistics_hold_what_float16_cannot() -> None:
    weight = torch.randn(4, 64) * 1e6
    weight_format = IntGroupFormat(bits=8, statistics="float32")
    dense = weight_format.unpack(weight_format.pack(weight), 4, 64, torch.float32)
    assert (dense - weight).abs().max() < 0.01 * weight.abs().max()


@pytest.mark.parametrize("statistics", ["float16", "float32"])
def test_absorb_adds_in_float64_and_rounds_once_as_stored(statistics: str) -> None:
    weight_format = IntGroupFormat(group_size=8, statistics=statistics)
    packed = weight_format.pack(torch.randn(6, 40))
    kept = {name: tensor.clone() for name, tensor in packed.items()}
    scales, offsets = (torch.randn(6, 5, dtype=torch.float64) * 0.01 for _ in range(2))
    scales.requires_grad_()
    offsets.requires_grad_()
    absorbed = weight_format.absorb(packed, GridUpdate(scales, offsets))
    stored = getattr(torch, statistics)
    for name, move in (("scales", scales), ("offsets", offsets)):
        expected = (packed[name].double() + move.detach()).to(stored)
        assert absorbed[name].dtype == torch.float32
        assert torch.equal(absorbed[name], expected.float())
        assert torch.equal(absorbed[name].detach().to(stored).float(), absorbed[name])
        # Straight through: the gradient of the rounded value is the gradient of the move.
        weights = torch.randn(6, 5) * 1e6  # far beyond fp16
        (absorbed[name] * weights).sum().backward()
        assert torch.equal(move.grad, weights.double())
    assert absorbed["codes"] is packed["codes"]
    assert all(torch.equal(packed[name], kept[name]) for name in kept)


def test_absorb_moves_only_what_it_is_given() -> None:
    weight_format = make_format("int", {"bits": 3})
    packed = weight_format.pack(torch.randn(6, 40))
    absorbed = weight_format.absorb(packed, GridUpdate(offsets=torch.ones(6, 2).double()))
    assert {name for name in packed if absorbed[name] is packed[name]} == {
        "codes",
        "codes_high",
        "scales",
    }


@pytest.mark.parametrize(
    ("bits", "group_size", "expected"), [(4, 32, 5.0), (4, 128, 4.25), (3, 32, 4.0), (2, 64, 2.5)]
)
def test_bits_per_weight(bits: int, group_size: int, expected: float) -> None:
    specs = IntGroupFormat(bits=bits, group_size=group_size).storage(4096, 4096)
    assert sum(spec.bytes for spec in specs.values()) * 8 / 4096**2 == expected
