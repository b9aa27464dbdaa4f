from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from graft.calibrate.hqq import hqq_pack
from graft.errors import GraftError
from graft.formats.codebook import CodebookFormat
from graft.formats.int_group import IntGroupFormat
from graft.formats.registry import describe_format
from graft.model.load import load_model
from graft.model.targets import linear_layers


def heavy_tailed(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns) * torch.rand(rows, columns).add(0.05).rsqrt()


def one_group(w: Tensor, scale: float, start: float, bits: int) -> tuple[float, Tensor]:
    """HQQ's alternation on one group, element by element; offsets are fp16 at every step."""
    levels, numbers = 2**bits - 1, w.tolist()

    def codes(offset: float) -> list[float]:
        return [min(max(float(round((x - offset) / scale)), 0), levels) for x in numbers]

    def error(offset: float) -> float:
        pairs = zip(numbers, codes(offset), strict=True)
        return sum(abs((x - scale * q - offset) / scale) ** 0.7 for x, q in pairs)

    offset = best = start
    beta = 10.0
    for _ in range(20):
        moves = []
        for x, q in zip(numbers, codes(offset), strict=True):
            lost = (x - scale * q - offset) / scale
            shrunk = max(abs(lost) - max(abs(lost), 1e-12) ** (0.7 - 1) / beta, 0)
            moves.append(lost - (shrunk if lost > 0 else -shrunk))
        moved = offset + scale * sum(moves) / len(moves)
        offset = torch.tensor(moved, dtype=torch.float64).half().item()
        if error(offset) < error(best):
            best = offset
        beta *= 1.01
    return best, torch.tensor(codes(best))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_equals_a_plain_float64_loop(bits: int) -> None:
    weight = heavy_tailed(4, 148)  # the last group has 4
    weight_format = IntGroupFormat(bits=bits, group_size=16)
    nearest, packed = weight_format.pack(weight), hqq_pack(weight, weight_format)
    assert torch.equal(packed["scales"], nearest["scales"])
    moved = 0
    dense = weight_format.unpack(packed, 4, 148, torch.float32)
    for row in range(4):
        for group, w in enumerate(weight[row].double().split(16)):
            scale = nearest["scales"][row, group].item()
            start = nearest["offsets"][row, group].item()
            offset, codes = one_group(w, scale, start, bits)
            assert packed["offsets"][row, group].item() == offset
            moved += offset != start
            found = dense[row, group * 16 : group * 16 + 16].double()
            assert torch.equal(found, (scale * codes.double() + offset).float().double())
    assert moved > (2 if bits == 8 else 10)  # of 40 groups


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_error_is_smaller_in_the_norm_that_it_minimises(bits: int) -> None:
    weight = heavy_tailed(32, 256).bfloat16()
    weight_format = IntGroupFormat(bits=bits)
    packed = hqq_pack(weight, weight_format)

    def errors(tensors: dict[str, Tensor]) -> Tensor:
        lost = weight_format.unpack(tensors, 32, 256, torch.float32) - weight.float()
        steps = lost.unflatten(1, (-1, 32)) / tensors["scales"].float()[..., None]
        return steps.abs().pow(0.7).sum(-1)

    hqq, rtn = errors(packed), errors(weight_format.pack(weight))
    assert bool((hqq <= rtn * (1 + 1e-5)).all())
    assert hqq.sum() < 0.97 * rtn.sum()
    again = hqq_pack(weight * 2**-6, weight_format)
    assert torch.equal(again["codes"], packed["codes"])  # whatever the weight's own magnitude


def test_another_format_is_refused() -> None:
    with pytest.raises(GraftError, match="offsets of the int format, found 'nf4'"):
        hqq_pack(torch.randn(4, 8), CodebookFormat())


def test_while_a_model_is_read(tiny_base: Path) -> None:
    weight_format = IntGroupFormat(bits=3)
    seen: list[str] = []

    def pack(name: str, weight: Tensor, chosen: IntGroupFormat) -> dict[str, Tensor]:
        seen.append(name)
        return hqq_pack(weight, chosen)

    loaded = load_model(str(tiny_base), weight_format=weight_format, pack=pack)
    layers = linear_layers(loaded.model)
    assert seen == list(layers)
    dense = linear_layers(load_model(str(tiny_base)).model)
    for name, layer in layers.items():
        assert describe_format(layer.weight_format) == describe_format(weight_format)
        expected = hqq_pack(dense[name].weight, weight_format)
        assert all(torch.equal(layer.packed[key], expected[key]) for key in expected)
