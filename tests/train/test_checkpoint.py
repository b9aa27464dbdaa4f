"""Checkpoints: what is refused before anything is touched, and which of them is taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from graft.errors import GraftError
from graft.optimizers.adamw import ADAMW
from graft.train.checkpoint import (
    Position,
    checkpoints,
    load_checkpoint,
    newest_whole,
    note_evaluation,
    random_state,
    read_position,
    save_checkpoint,
)
from graft.train.config import LoopConfig

STATE, TENSORS = "state.json", "state.safetensors"


class Training:
    """Two parameters with an optimizer that has stepped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parameters = {name: nn.Parameter(torch.randn(3, 8)) for name in ("a", "b")}
        groups = [{"params": list(self.parameters.values()), "factor": 1.0}]
        self.optimizer = ADAMW.make(groups, 1e-2, LoopConfig(out=""), torch.device("cpu"))
        self.step()

    def step(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = torch.randn(3, 8)
        self.optimizer.step()

    def save(self, step: int) -> Path:
        position = Position(step, {"epoch": 0, "position": step}, {"loss": 1.5})
        parts = self.parameters, self.optimizer, ADAMW
        return save_checkpoint(self.folder, position, random_state(), *parts)

    def load(self, path: Path) -> None:
        load_checkpoint(path, self.parameters, self.optimizer, ADAMW)


@pytest.fixture
def training(tmp_path: Path) -> Training:
    return Training(tmp_path)


def test_what_is_loaded_is_what_was_saved(training):
    path = training.save(3)
    expected = {name: parameter.detach().clone() for name, parameter in training.parameters.items()}
    drawn = torch.rand(4)
    training.step()
    training.load(path)
    assert all(torch.equal(training.parameters[name], expected[name]) for name in expected)
    assert torch.equal(torch.rand(4), drawn), "the random numbers go on too"
    assert read_position(path) == Position(3, {"epoch": 0, "position": 3}, {"loss": 1.5})


Change = Callable[[dict[str, Tensor]], object]
MISFITS: dict[str, tuple[Change, str]] = {
    "a state smaller than its parameter": (
        lambda t: t.update({"optimizer.exp_avg.a": t["optimizer.exp_avg.a"][:1, :1].clone()}),
        r"optimizer\.exp_avg\.a: the checkpoint has float32 \[1, 1\], the run float32 \[3, 8\]",
    ),
    "a state of another dtype": (
        lambda t: t.update({"optimizer.exp_avg_sq.b": t["optimizer.exp_avg_sq.b"].double()}),
        r"optimizer\.exp_avg_sq\.b: the checkpoint has float64",
    ),
    "a count of steps for each number": (
        lambda t: t.update({"optimizer.step.a": torch.ones(3, 8)}),
        r"optimizer\.step\.a: the checkpoint has float32 \[3, 8\], the run float32 \[1\]",
    ),
    "no count of steps": (lambda t: t.pop("optimizer.step.a"), "a: the checkpoint has no state"),
    "a parameter of another shape": (
        lambda t: t.update({"parameter.a": t["parameter.a"].T.contiguous()}),
        r"parameter\.a: the checkpoint has float32 \[8, 3\]",
    ),
    "no parameter": (lambda t: t.pop("parameter.b"), r"parameter\.b: the checkpoint has none"),
    "a name too many": (
        lambda t: t.update({"parameter.c": torch.ones(1)}),
        r"parameter\.c is nothing that the run has",
    ),
    "a short random state": (lambda t: t.update(rng=t["rng"][:100].clone()), "rng: the checkpoint"),
    "a random state of floats": (lambda t: t.update(rng=t["rng"].float()), "rng: .*float32"),
    "a random state that is none": (
        lambda t: t.update(rng=torch.full_like(t["rng"], 255)),
        "rng is no state of random numbers",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_tensor_that_does_not_fit_is_refused_before_anything_is_changed(training, name):
    change, told = MISFITS[name]
    path = training.save(3)
    tensors = load_file(path / TENSORS)
    tensors["parameter.a"] += 1
    change(tensors)
    save_file(tensors, path / TENSORS)
    before = {name: parameter.detach().clone() for name, parameter in training.parameters.items()}
    random = torch.get_rng_state()
    with pytest.raises(GraftError, match=told):
        training.load(path)
    assert all(torch.equal(training.parameters[name], before[name]) for name in before)
    assert torch.equal(torch.get_rng_state(), random)


def test_all_that_does_not_fit_is_told_at_once(training):
    path = training.save(3)
    tensors = load_file(path / TENSORS)
    del tensors["parameter.b"], tensors["optimizer.exp_avg.a"]
    save_file(tensors, path / TENSORS)
    with pytest.raises(GraftError, match="2 problems"):
        training.load(path)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)


def rewrite(path: Path, **values: object) -> None:
    (path / STATE).write_text(json.dumps(json.loads((path / STATE).read_text()) | values))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty tensors": lambda path: (path / TENSORS).write_bytes(b""),
    "cut tensors": lambda path: (path / TENSORS).write_bytes((path / TENSORS).read_bytes()[:-20]),
    "a flipped bit": lambda path: flip(path / TENSORS),
    "no tensors": lambda path: (path / TENSORS).unlink(),
    "an empty state": lambda path: (path / STATE).write_bytes(b""),
    "no state": lambda path: (path / STATE).unlink(),
    "a state of zeros": lambda path: (path / STATE).write_bytes(bytes(200)),
    "a step that is a text": lambda path: rewrite(path, step="4"),
    "another step": lambda path: rewrite(path, step=3),
    "a place that is a list": lambda path: rewrite(path, sampler=[1, 2]),
    "another place": lambda path: rewrite(path, sampler={"epoch": 0, "position": 7}),
    "another best": lambda path: rewrite(path, best={"step": 1, "loss": 1.0, "improved": 1.0}),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_the_newest_that_is_whole_is_taken(training, name):
    older, newer = training.save(2), training.save(4)
    DAMAGES[name](newer)
    found, damaged = newest_whole(training.folder)
    assert found == older
    assert len(damaged) == 1 and str(newer) in damaged[0]
    DAMAGES[name](older)
    assert newest_whole(training.folder)[0] is None


def test_a_checkpoint_of_an_earlier_version_has_no_sum_of_its_state(training):
    path = training.save(4)
    state = json.loads((path / STATE).read_text())
    del state["state_sha256"]
    (path / STATE).write_text(json.dumps(state))
    assert newest_whole(training.folder) == (path, [])


def test_what_is_noted_of_an_evaluation_leaves_the_checkpoint_whole(training):
    path = training.save(4)
    noted = Position(4, {"epoch": 0, "position": 4}, {"eval_loss": float("nan")}, evaluated=4)
    note_evaluation(training.folder, noted)
    assert newest_whole(training.folder) == (path, [])
    assert read_position(path).evaluated == 4


def test_what_may_be_whole_is_not_passed_over(training, monkeypatch):
    _, newer = training.save(2), training.save(4)

    def failing(path, *arguments):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("graft.train.checkpoint.open_regular", failing)
        with pytest.raises(GraftError, match="step-00000004 cannot be read: Input/output error"):
            newest_whole(training.folder)
    rewrite(newer, version=2, sampler=None)
    with pytest.raises(GraftError, match="has version 2, and this version of graft reads 1"):
        newest_whole(training.folder)


def test_a_checkpoint_whose_base_is_gone_is_no_use(training):
    older, _ = training.save(2), training.save(4)
    found, unusable = newest_whole(training.folder, up_to=3)
    assert found == older and "its base is gone" in unusable[0]


def steps_of(training: Training) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoints(training.folder)]


def test_two_are_kept_and_none_of_later_steps(training):
    for step in (2, 4, 6):
        training.save(step)
    assert [path.name for path in checkpoints(training.folder)] == [
        "step-00000004",
        "step-00000006",
    ]
    training.save(5)
    assert [path.name for path in checkpoints(training.folder)] == [
        "step-00000004",
        "step-00000005",
    ]
    training.save(5)
    assert [path.name for path in checkpoints(training.folder)] == [
        "step-00000004",
        "step-00000005",
    ]
    assert not list(training.folder.glob(".*"))
