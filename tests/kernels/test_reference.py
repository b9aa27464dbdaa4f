"""What the reference backend computes in ways of its own, against numpy."""

from __future__ import annotations

import numpy
import torch

from graft.kernels.moves.reference import round_once


def test_float64_is_rounded_once() -> None:
    """By way of float32, about one value in 10,000 would go the other way."""
    values = torch.cat(
        [
            torch.randn(200_000, dtype=torch.float64),
            torch.randn(1000, dtype=torch.float64) * 1e-7,
            torch.tensor([0.0, -0.0, 65519.99999, 65520.0, -1e300, float("inf"), float("nan")]),
        ]
    )
    with numpy.errstate(over="ignore"):
        expected = torch.from_numpy(values.numpy().astype(numpy.float16))
    torch.testing.assert_close(
        round_once(values, torch.float16), expected, rtol=0, atol=0, equal_nan=True
    )
    assert not torch.equal(values.half()[:-1], expected[:-1])
    torch.testing.assert_close(
        round_once(values, torch.float32), values.float(), rtol=0, atol=0, equal_nan=True
    )
