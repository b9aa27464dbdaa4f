from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from graft.api.run.ending import Ending


def ending(
    losses: list[tuple[int, float]], kept: int | None = None, training: Any = None, **facts: Any
) -> Ending:
    history: list[dict[str, float]] = [{"step": s, "eval_loss": loss} for s, loss in losses]
    history += [{"step": s, "loss": loss} for s, loss in training or []]
    done = losses[-1][0]
    given: dict[str, Any] = {
        "run": Path("out"),
        "history": history,
        "steps": done,
        "done": done,
        "kept_step": done if kept is None else kept,
        "keep": "best",
        "patience": None,
        "min_improvement": 0.0,
        "learning_rate": 4e-3,
        "can_go_on": True,
    }
    return Ending(**given | facts)


def test_a_run_that_went_well_needs_nothing() -> None:
    found = ending([(0, 3.0), (50, 2.0), (100, 1.9999)])
    assert not found.worse and found.next_steps() == []
    assert found.reason() == "all 100 steps were done" and found.kept() == "step 100, the last"


def test_a_run_that_learnt_by_heart_is_told_from_one_that_diverged() -> None:
    losses = [(0, 2.0), (100, 2.5)]
    (heart,) = ending(losses, training=[(1, 2.0), (100, 0.5)]).next_steps()
    assert "worse on held-out rows than before training (2.0000 → 2.5000)" in heart
    assert "more rows" in heart and "--eval-every" in heart and "--learning-rate 0.001" in heart
    (diverged,) = ending(losses, training=[(1, 2.0), (100, 5.0)]).next_steps()
    assert "did not fall either; try --learning-rate 0.001 (it was 0.004)" in diverged


def test_a_loss_that_is_no_number_is_worse() -> None:
    assert ending([(0, 2.0), (100, float("nan"))]).worse


def test_a_best_in_the_middle_is_kept_and_told() -> None:
    found = ending([(0, 3.0), (40, 2.0), (80, 2.5)], kept=40)
    assert found.loss == 2.0 and found.last == 2.5 and not found.worse
    assert found.kept() == "step 40, the best evaluation of 2 after the first step"
    (line,) = found.next_steps()
    assert "rose after step 40 (2.0000 → 2.5000)" in line and "--steps 40" in line


def test_a_last_that_is_not_the_best_is_told() -> None:
    found = ending([(0, 3.0), (40, 2.0), (80, 2.5)], keep="last")
    assert found.kept() == "step 80, the last; the best evaluation was at step 40"
    (line,) = found.next_steps()
    assert "lowest at step 40; --keep best" in line


@pytest.mark.parametrize(("last", "falling"), [(1.9, True), (1.9995, False), (1.97, False)])
def test_a_loss_that_still_falls_asks_for_more_steps(last: float, falling: bool) -> None:
    found = ending([(0, 3.0), (50, 2.0), (100, last)])
    assert bool(found.next_steps()) == falling
    if falling:
        assert "graft train --resume --out out --steps 200" in found.next_steps()[0]
        assert ending([(0, 3.0), (50, 2.0), (100, last)], can_go_on=False).next_steps() == []


def test_an_early_end_says_why_and_how_to_go_on() -> None:
    facts: dict[str, Any] = {"steps": 500, "patience": 2, "min_improvement": 0.01}
    found = ending([(0, 3.0), (50, 2.0), (100, 2.1), (150, 2.2)], kept=50, **facts)
    assert found.reason() == (
        "stopped early after step 150 of 500: no improvement by more than 0.01 in 2 evaluations "
        "(--patience)"
    )
    assert found.next_steps()[-1].endswith("graft train --resume --out out --patience 4")
