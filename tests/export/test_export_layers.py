"""What the targets share: codes side by side, and weights that are finite."""

from __future__ import annotations

import pytest
import torch

from graft.errors import GraftError
from graft.export.layers import require_finite, scales, side_by_side, zero_points
from graft.formats.int_group import IntGroupFormat
from graft.kernels.packed.planes import pack_codes
from graft.layers.frozen import FrozenLinear

ROWS = 3


def layer_of(codes: torch.Tensor, bits: int, group_size: int) -> FrozenLinear:
    rows, columns = codes.shape
    weight_format = IntGroupFormat(bits, group_size)
    shape = rows, weight_format.groups(columns)
    grid = {"scales": torch.rand(shape).half() + 0.5, "offsets": torch.randn(shape).half()}
    return FrozenLinear(columns, rows, weight_format, weight_format.pack_codes(codes, grid))


@pytest.mark.parametrize(
    ("bits", "stored", "columns", "filled"),
    [
        *((bits, bits, columns, columns) for bits in (2, 3, 4, 8) for columns in (32, 96)),
        (3, 4, 64, 64),
        (2, 4, 64, 64),
        (4, 4, 72, 72),  # its plane is filled up to 96
        (4, 4, 72, 128),
        (2, 2, 72, 128),
        (4, 4, 4096, 4096),
    ],
)
def test_codes_lie_side_by_side(bits: int, stored: int, columns: int, filled: int) -> None:
    rows = 500 if columns == 4096 else ROWS  # more than fit into one piece
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    found = side_by_side(layer_of(codes, bits, 8), stored, filled)
    assert found.shape == (rows, filled * stored // 8) and found.dtype == torch.uint8
    for row in (0, rows - 1):
        stream = sum(int(code) << stored * place for place, code in enumerate(codes[row]))
        assert bytes(found[row].tolist()) == stream.to_bytes(filled * stored // 8, "little")


def test_the_layer_is_left_as_it_was() -> None:
    codes = torch.randint(0, 16, (ROWS, 64), dtype=torch.uint8)
    layer = layer_of(codes, 4, 32)
    side_by_side(layer, 4, 64)
    assert torch.equal(layer.packed["codes"], pack_codes(codes, 4)[0])


def test_zero_points_give_the_weight() -> None:
    codes = torch.randint(0, 16, (ROWS, 64), dtype=torch.uint8)
    layer = layer_of(codes, 4, 32)
    grouped = codes.double().unflatten(-1, (2, 32))
    weight = (
        (grouped - zero_points(layer).double()[..., None]) * scales(layer)[..., None]
    ).flatten(1)
    trained = layer.dense_weight().double()
    assert (weight - trained).abs().max() <= 2.5e-7 * trained.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_weight_that_is_not_finite(dtype: torch.dtype, value: float) -> None:
    weight = torch.randn(5, 40).to(dtype)
    require_finite("layer", weight)
    weight[3, 17] = value
    with pytest.raises(GraftError, match=r"layer: weights are not finite"):
        require_finite("layer", weight)
