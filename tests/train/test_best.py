from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graft.errors import GraftError
from graft.train.best import Best, BestParameters


class Run:
    """Parameters that have the number of their step everywhere."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.parameters = {
            "a": nn.Parameter(torch.zeros(3, 2)),
            "b": nn.Parameter(torch.zeros(4, dtype=torch.bfloat16)),
        }
        self.best = BestParameters(folder / "best", self.parameters, **options)

    def at(self, step: int, loss: float, last: bool = False) -> None:
        self.be(step)
        self.best.evaluated(step, loss, last)

    def be(self, step: int) -> None:
        with torch.no_grad():
            for parameter in self.parameters.values():
                parameter.fill_(step)

    def holds(self) -> set[float]:
        return {value for p in self.parameters.values() for value in p.flatten().tolist()}

    def kept(self) -> list[str]:
        return sorted(path.name for path in self.best.folder.glob("*"))


def test_the_best_is_put_back_bit_for_bit(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step, loss in ((2, 3.0), (4, 1.0), (6, 2.0), (8, 1.0)):
        run.at(step, loss, last=step == 8)
    assert run.best.state == Best(4, 1.0, 1.0, 2), "the earlier one of two that are equal"
    assert run.best.recall(8) == 4
    assert run.holds() == {4.0}


def test_the_last_one_needs_no_file(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.at(8, 1.0, last=True)
    assert run.best.recall(8) == 8 and run.holds() == {8.0} and run.kept() == []


def test_only_figures_are_kept_of_the_last(tmp_path: Path) -> None:
    run = Run(tmp_path, writes=False)
    run.at(2, 1.0)
    run.at(4, 2.0, last=True)
    assert run.best.state == Best(2, 1.0, 1.0, 1)
    assert run.best.recall(4) == 4 and run.kept() == []


def test_steps_before_the_rounding_do_not_count(tmp_path: Path) -> None:
    run = Run(tmp_path, first=5, patience=1)
    run.at(2, 0.5)
    run.at(4, 9.0)
    assert run.best.state is None and not run.best.exhausted
    run.at(6, 3.0)
    assert run.best.recall(8) == 6


def test_a_loss_that_is_no_number_is_no_best(tmp_path: Path) -> None:
    run = Run(tmp_path, patience=2)
    run.at(1, math.nan)
    assert run.best.state is None
    run.at(2, 2.0)
    run.at(3, math.nan)
    run.at(4, math.inf)
    assert run.best.state == Best(2, 2.0, 2.0, 2) and run.best.exhausted


def test_patience_counts_improvements_by_more_than_the_least(tmp_path: Path) -> None:
    run = Run(tmp_path, patience=3, min_improvement=0.1)
    for step, loss in ((1, 1.0), (2, 0.95), (3, 0.92)):
        run.at(step, loss)
    assert run.best.state == Best(3, 0.92, 1.0, 2) and not run.best.exhausted
    run.at(4, 0.85)
    assert run.best.state == Best(4, 0.85, 0.85, 0)
    for step in (5, 6, 7):
        assert not run.best.exhausted
        run.at(step, 0.8)
    assert run.best.exhausted


def test_an_older_best_stays_as_long_as_a_checkpoint_needs_it(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step, loss in ((10, 3.0), (20, 2.0), (30, 1.0)):
        run.at(step, loss)
    run.best.sweep([15, 18])  # both of which need that of step 10, and none that of step 20
    assert run.kept() == ["step-00000010", "step-00000030"]
    run.best.sweep([18, 30])
    assert run.kept() == ["step-00000010", "step-00000030"]
    run.best.sweep([30, 35])
    assert run.kept() == ["step-00000030"]
    run.at(40, 0.5)
    run.best.sweep([5])
    assert run.kept() == ["step-00000040"]


def test_going_on_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step, loss in ((10, 3.0), (20, 2.0), (30, 1.0)):
        run.at(step, loss)
    again = Run(tmp_path)
    assert again.best.restore(Best(20, 2.0, 2.0), 25) is None
    assert again.kept() == ["step-00000010", "step-00000020"]
    assert again.best.recall(99) == 20 and again.holds() == {20.0}
    assert Run(tmp_path).best.restore(None, 0) is None
    assert run.kept() == []


def test_the_last_steps_parameters_are_kept_when_more_steps_follow(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.be(8)
    assert run.best.restore(Best(8, 1.0, 1.0), 8) is None
    run.at(12, 2.0, last=True)
    assert run.best.recall(12) == 8 and run.holds() == {8.0}


def test_a_best_that_is_gone_is_told(tmp_path: Path) -> None:
    run = Run(tmp_path)
    note = run.best.restore(Best(4, 1.0, 1.0), 8)
    assert note is not None and "step 4" in note and run.best.state is None


@pytest.mark.parametrize("damage", ["flip", "cut", "none", "state", "swapped"])
def test_damaged_parameters_are_refused(damage: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.at(2, 1.0)
    file = run.best.folder / "step-00000002" / "parameters.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-5])
    elif damage == "none":
        file.unlink()
    elif damage == "state":
        (file.parent / "state.json").write_text("[]", encoding="utf-8")
    else:
        run.parameters["b"] = nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))
    run.be(9)
    with pytest.raises(GraftError, match="--resume --keep last"):
        run.best.recall(9)
    assert run.holds() - {0.0} == {9.0}
