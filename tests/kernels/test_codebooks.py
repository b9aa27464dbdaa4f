from __future__ import annotations

import pytest
import torch

from graft.kernels.packed.codebooks import (
    CODEBOOK_NAMES,
    codebook,
    dynamic_code,
    dynamic_code_table,
    quantisation_bounds,
)


def normal_quantile(probability: float) -> float:
    return (2**0.5) * torch.erfinv(torch.tensor(2 * probability - 1, dtype=torch.float64)).item()


def test_nf4_is_made_of_normal_quantiles() -> None:
    # QLoRA, equation 4: quantiles of N(0, 1), 8 on the negative and 9 on the positive side.
    edge = 0.9677083
    positive = [normal_quantile(0.5 + (edge - 0.5) * i / 8) for i in range(9)]
    negative = [-normal_quantile(0.5 + (edge - 0.5) * i / 7) for i in range(1, 8)]
    expected = torch.tensor(sorted(negative + positive), dtype=torch.float64)
    found = codebook("nf4").double()
    torch.testing.assert_close(found, expected / expected.max(), rtol=0, atol=1e-6)
    assert found[7] == 0
    assert found[0] == -1
    assert found[15] == 1


def test_fp4_is_e2m1_over_12() -> None:
    # Bit patterns sign|exponent|mantissa; bitsandbytes' table is 12 times these.
    magnitudes = [0, 0.0625, 8, 12, 4, 6, 2, 3]
    for code in range(16):
        sign = -1 if code >= 8 else 1
        expected = torch.tensor(sign * magnitudes[code % 8], dtype=torch.float32) / 12
        assert codebook("fp4")[code] == expected


def test_an_unknown_codebook() -> None:
    with pytest.raises(KeyError):
        codebook("nf5")


@pytest.mark.parametrize("name", CODEBOOK_NAMES)
def test_bounds_choose_the_nearest_value(name: str) -> None:
    bounds, code_of_rank = quantisation_bounds(name)
    values = codebook(name)
    x = torch.linspace(-1, 1, 10_001)
    chosen = values[code_of_rank[torch.bucketize(x, bounds)].long()]
    nearest = (x[:, None].double() - values.double()).abs().amin(1)
    torch.testing.assert_close((x.double() - chosen.double()).abs(), nearest, rtol=0, atol=1e-7)
    at_bound = values[code_of_rank[torch.bucketize(bounds, bounds)].long()]
    assert torch.equal(at_bound, values.sort().values[:-1])  # a tie goes to the lower value


def test_dynamic_code() -> None:
    # A sign, e leading zeros, and a fraction in the rest: 10^(e-6) times the means of 2^e + 1
    # equally spaced edges from 0.1 to 1, plus 0 and 1.
    expected = [0.0, 1.0]
    for exponent in range(7):
        count = 2**exponent
        for i in range(count):
            mean = 0.1 + 0.9 * (i + 0.5) / count
            expected += [mean * 10 ** (exponent - 6), -mean * 10 ** (exponent - 6)]
    found = dynamic_code()
    assert found.shape == (256,)
    assert torch.equal(found, found.sort().values)
    torch.testing.assert_close(
        found.double(), torch.tensor(sorted(expected), dtype=torch.float64), rtol=1e-6, atol=1e-12
    )


def test_dynamic_code_table_is_nearest_at_its_own_values() -> None:
    table, code = dynamic_code_table(), dynamic_code().double()
    for index in range(0, 65536, 97):
        value = index / 32767.5 - 1
        distance = (code - value).abs()
        assert distance[int(table[index])] <= distance.min() + 1e-7
