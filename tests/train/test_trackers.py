from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from graft.train import tensorboard
from graft.train.tensorboard import TENSORBOARD
from graft.train.trackers import TRACKERS, Tracker, Watchers

SAMPLE = {"prompt": "a <b>", "text": "c\x1b[31m", "reference": "d"}


class Kept(Tracker):
    """Remembers what it is told, and fails when it is told to."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.told = fails, list[Any]()

    def on_metrics(self, metrics):
        if self.fails:
            raise ConnectionError("no network \x1b[2J")
        self.told.append(dict(metrics))

    def on_text(self, step, texts):
        self.told.append((step, list(texts)))

    def on_end(self, report):
        self.told.append(report)


def test_a_tracker_that_fails_is_told_of_once_and_left_out() -> None:
    notes: list[str] = []
    good, bad = Kept(), Kept(fails=True)
    watchers = Watchers([bad, good, Tracker()], notes.append)
    for step in (1, 2):
        watchers.metrics({"step": step, "loss": 0.5})
    watchers.text(2, [SAMPLE])
    watchers.end({"steps": 2})
    assert good.told == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.5},
        (2, [SAMPLE]),
        {"steps": 2},
    ]
    assert bad.told == []
    (note,) = notes
    assert "Kept failed (ConnectionError: no network" in note and "\x1b" not in note


@pytest.mark.parametrize("name", list(TRACKERS))
def test_every_tracker_says_what_it_is(name: str) -> None:
    assert TRACKERS[name].name == name and TRACKERS.summary(name)


class Writer:
    """Stands for TensorBoard's, which the tests do without."""

    made: list[Writer] = []

    def __init__(self, log_dir: str, purge_step: int, flush_secs: int) -> None:
        self.log_dir, self.purge_step, self.calls = log_dir, purge_step, list[tuple[Any, ...]]()
        Writer.made.append(self)

    def add_scalar(self, *call: object) -> None:
        self.calls.append(call)

    def add_text(self, *call: object) -> None:
        self.calls.append(call)

    def close(self) -> None:
        self.calls.append(("closed",))


def test_tensorboard_gets_scalars_and_texts_in_the_runs_folder(monkeypatch, tmp_path: Path) -> None:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(Writer, "made", [])
    tracker = TENSORBOARD.make(tmp_path)
    tracker.on_metrics({"step": 5, "loss": 1.5, "grad_norm": 2.0})
    tracker.on_metrics({"step": 5, "eval_loss": 1.25})
    tracker.on_text(5, [SAMPLE])
    tracker.on_end({})
    (writer,) = Writer.made
    assert writer.log_dir == str(tmp_path / "tensorboard")
    assert writer.purge_step == 5, "what a killed run wrote after its checkpoint is hidden"
    *scalars, text, closed = writer.calls
    assert scalars == [
        ("training/loss", 1.5, 5),
        ("training/grad_norm", 2.0, 5),
        ("held out/eval_loss", 1.25, 5),
    ]
    assert text[0] == "sample 1" and "\\<b\\>" in text[1] and "\x1b" not in text[1]
    assert closed == ("closed",)


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch) -> None:
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    missing = TENSORBOARD.missing()
    assert missing is not None and "pip install 'graft-llm[tensorboard]'" in missing
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: object())
    assert TENSORBOARD.missing() is None
