from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graft.adapters.attach import adapted_layer, attach_adapter
from graft.adapters.config import AdapterConfig
from graft.adapters.merge import merge
from graft.adapters.starts.loftq import LoftQ, loftq
from graft.adapters.starts.low_rank import set_starts
from graft.adapters.svd import truncated_svd
from graft.formats.dense import DenseFormat
from graft.formats.registry import make_format
from graft.layers.frozen import FrozenLinear

FORMATS = [
    ("nf4", {"double_quant": True}),
    ("fp4", {}),
    ("int", {"bits": 4}),
    ("int", {"bits": 2, "group_size": 8}),
    ("int8", {}),
]


def low_rank_weight(rows: int, columns: int) -> Tensor:
    """A weight with a few strong directions, as trained ones have."""
    return torch.randn(rows, 4) @ torch.randn(4, columns) / 4 + torch.randn(rows, columns) / 4


@pytest.mark.parametrize(("name", "options"), FORMATS)
@pytest.mark.parametrize("scaling", [1.0, 0.25])
def test_equals_the_algorithm_written_out(name: str, options: dict, scaling: float) -> None:
    rows, columns, rank = 24, 64, 16  # the probes span all rows, so the small SVD is the whole one
    weight, weight_format = low_rank_weight(rows, columns), make_format(name, options)
    update, errors, kept = torch.zeros(rows, columns, dtype=torch.float64), [], []
    for _ in range(4):
        packed = weight_format.pack((weight.double() - update).float())
        rounded = weight_format.unpack(packed, rows, columns, torch.float32).double()
        u, s, v = torch.linalg.svd(weight.double() - rounded)
        update = sum(s[i] * torch.outer(u[:, i], v[i]) for i in range(rank))
        errors.append((weight.double() - rounded - update).square().sum().item())
        kept.append((packed, update))
    packed, expected = kept[errors.index(min(errors))]
    found, start = loftq(weight, weight_format, rank, scaling, 4, weight_format.pack)
    assert torch.equal(found["codes"], packed["codes"])
    dense = [weight_format.unpack(p, rows, columns, torch.float32) for p in (found, packed)]
    torch.testing.assert_close(*dense, rtol=0, atol=1e-5)  # A and B are float32
    product = scaling * start.B.double() @ start.A.double()
    torch.testing.assert_close(product, expected, rtol=0, atol=1e-5)
    assert start.error == pytest.approx(min(errors), rel=1e-5)
    torch.testing.assert_close(start.A.norm(dim=1), start.B.norm(dim=0))
    nearest = weight_format.unpack(weight_format.pack(weight), rows, columns, torch.float32)
    assert start.rounding_error == pytest.approx((weight - nearest).square().sum().item(), rel=1e-5)
    assert start.error < 0.5 * start.rounding_error


def test_the_svd_is_near_the_best_one_where_the_spectrum_is_flat() -> None:
    matrix = torch.randn(300, 200, dtype=torch.float64)
    u, s, v = truncated_svd(matrix, 16)
    left = (matrix - u * s @ v).square().sum()
    best = torch.linalg.svdvals(matrix)[16:].square().sum()
    assert best <= left * (1 + 1e-12)
    assert left < 1.01 * best
    eye = torch.eye(16, dtype=torch.float64)
    torch.testing.assert_close(u.T @ u, eye)
    torch.testing.assert_close(v @ v.T, eye)
    assert all(
        torch.equal(*pair) for pair in zip((u, s, v), truncated_svd(matrix, 16), strict=True)
    )


def started_model(weight: Tensor, rank: int) -> tuple[nn.Sequential, LoftQ]:
    weight_format = make_format("nf4")
    init = LoftQ(rank, scaling=2.0, rounds=3)
    packed = init.pack("0", weight, weight_format, weight_format.pack)
    model = nn.Sequential(FrozenLinear(weight.shape[1], weight.shape[0], weight_format, packed))
    attach_adapter(model, ["0"], AdapterConfig(method="qlora", rank=rank, alpha=2.0 * rank))
    set_starts(model, init.starts)
    return model, init


@pytest.mark.parametrize("rank", [8, 40])  # 40 is more than the layer has rows
def test_the_adapted_layer_starts_near_the_dense_weight(rank: int) -> None:
    weight = low_rank_weight(32, 48)
    model, init = started_model(weight, rank)
    layer = adapted_layer(model, "0")
    lost = (layer.effective_weight() - weight.double()).square().sum().item()
    assert lost == pytest.approx(init.starts["0"].error, rel=1e-4, abs=1e-9)
    rounded = (layer.base.dense_weight() - weight).square().sum().item()
    assert lost < 0.7 * rounded
    assert init.left() == pytest.approx(lost / init.starts["0"].rounding_error, rel=1e-4, abs=1e-9)


def test_only_what_was_trained_goes_into_another_base() -> None:
    weight = low_rank_weight(32, 48)
    model, _ = started_model(weight, 8)
    layer = adapted_layer(model, "0")
    start = {name: p.detach().clone() for name, p in layer.adapter("default").named_parameters()}
    attach_adapter(model, ["0"], AdapterConfig(method="qlora", rank=8, alpha=16), "start")
    layer.active = ("default",)
    with torch.no_grad():
        for name, parameter in layer.adapter("start").named_parameters():
            parameter.copy_(start[name])
        layer.adapter("default").B.add_(0.1 * torch.randn(32, 8))
    original = FrozenLinear(48, 32, DenseFormat(), {"weight": weight})
    merged = merge(layer, DenseFormat(), original, "start").layer.dense_weight().double()
    B, A = layer.adapter("default").B.double(), start["A"].double()
    expected = weight.double() + 2 * (B - start["B"].double()) @ A
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)
