from __future__ import annotations

import math

import pytest

from graft.adapters.config import AdapterConfig
from graft.train.schedule import default_learning_rate, rate_factors, scheduled_learning_rate

WIDTHS = (64, 128, 512, 2048, 4096)


def test_the_default_is_about_2e4_for_lora_at_4096() -> None:
    rate = default_learning_rate(AdapterConfig(method="lora"), 4096)
    assert 1.5e-4 <= rate <= 3e-4


@pytest.mark.parametrize("method", ["lora", "qlora", "qalora"])
def test_width_rank_and_scaling_enter_the_default(method: str) -> None:
    base = default_learning_rate(AdapterConfig(method=method), 1024)
    at = {width: default_learning_rate(AdapterConfig(method=method), width) for width in WIDTHS}
    share = 0.7 if method == "qalora" else 1.0
    assert at[128] == pytest.approx(share * 8e-3) and at[4096] == pytest.approx(share * 2.5e-4)
    assert at[64] == pytest.approx(2**0.5 * at[128])
    assert at[2048] == pytest.approx(2 ** (4 / 3) * at[4096])
    assert at[512] == pytest.approx(share * 4e-3), "where both powers meet"
    quarter = AdapterConfig(method=method, rank=64)
    assert default_learning_rate(quarter, 1024) == pytest.approx(base / 2)
    # The update's size is scaling times rate: twice the alpha, half the rate.
    twice = AdapterConfig(method=method, alpha=32)
    assert default_learning_rate(twice, 1024) == pytest.approx(base / 2)
    rooted = AdapterConfig(method=method, rslora=True)
    assert default_learning_rate(rooted, 1024) == pytest.approx(base / 4)


def test_warm_up_then_cosine_by_hand() -> None:
    rates = [scheduled_learning_rate(step, 10, 2.0, 0.2) for step in range(1, 11)]
    by_hand = [1.0, 2.0] + [1 + math.cos(math.pi * done / 8) for done in range(8)]
    assert rates == pytest.approx(by_hand)
    assert rates[-1] > 0


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert scheduled_learning_rate(1, 5, 0.3, 0.0) == 0.3


@pytest.mark.parametrize(("method", "share"), [("merge_aware", 1.0), ("qalora", 0.7)])
def test_a_grid_trains_at_affines_rate(method: str, share: float) -> None:
    config = AdapterConfig(method=method)
    names = dict.fromkeys(["q.A", "q.B", "q.u_A", "q.u_B", "q.v_A", "q.v_B"], 4)
    factors = rate_factors(config, 512, names)
    assert set(factors) == {"q.u_B", "q.v_B"}
    rate = default_learning_rate(config, 512) * factors["q.u_B"]
    affine = default_learning_rate(AdapterConfig(method="affine"), 512)
    assert rate == pytest.approx(share * affine)


def test_an_offset_moves_by_more_steps_where_the_range_has_more() -> None:
    bits = {"q.u": 2, "q.v": 2, "k.u": 4, "k.v": 4, "o.v": 3}
    factors = rate_factors(AdapterConfig(method="affine"), 512, bits)
    assert factors == {"q.v": 1, "k.v": 5, "o.v": 7 / 3}
    assert rate_factors(AdapterConfig(method="qalora"), 512, {"q.A": 4}) == {}
