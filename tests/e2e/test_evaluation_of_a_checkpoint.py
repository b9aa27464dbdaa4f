"""A checkpoint that a stop wrote before its step was evaluated takes the evaluation in later."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

import graft
from graft.api.events import Events
from graft.train import loop
from graft.train.metrics import read_metrics
from graft.train.stop import Stop, StoppedError


class Dies(KeyboardInterrupt):
    pass


class StopsAfter(Events):
    def __init__(self, stop: Stop, step: int) -> None:
        self.stop, self.step = stop, step

    def metrics(self, metrics) -> None:
        self.stop.asked = metrics["step"] == self.step and "loss" in metrics


@pytest.fixture
def config(tiny_base, rows, tmp_path):
    def make(name: str, steps: int = 4) -> graft.TrainConfig:
        return graft.TrainConfig(
            model=str(tiny_base),
            data=str(rows),
            out=str(tmp_path / name),
            method="lora",
            rank=2,
            steps=steps,
            batch_size=2,
            max_length=32,
            eval_every=1,
            learning_rate=0.3,
            save_every=2,
        )

    return make


def stopped(config: graft.TrainConfig, step: int) -> Path:
    stop = Stop()
    with pytest.raises(StoppedError):
        graft.finetune(config, StopsAfter(stop, step), stop)
    return Path(config.out)


def states(run: Path) -> dict[str, dict]:
    found = {}
    for path in sorted((run / "checkpoints").iterdir()):
        state = json.loads((path / "state.json").read_text())
        del state["state_sha256"]  # of times too
        for name in ("step_seconds", "tokens_per_second", "memory_bytes"):
            del state["metrics"][name]
        found[path.name] = state
    return found


def test_after_the_last_step(config) -> None:
    unbroken = config("unbroken")
    graft.finetune(unbroken)
    run = stopped(config("run"), 4)
    assert states(run)["step-00000004"]["evaluated"] == 3
    graft.finetune(dataclasses.replace(config("run"), resume=True))
    assert states(run) == states(Path(unbroken.out))


def test_an_evaluation_that_the_metrics_have_lost_is_not_counted_again(config) -> None:
    patient = {"learning_rate": 1e-9, "min_improvement": 1.0, "patience": 4}
    unbroken = dataclasses.replace(config("unbroken", 8), **patient)
    report = graft.finetune(unbroken)
    run = stopped(dataclasses.replace(config("run", 8), **patient), 3)
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["step"] < 2 or '"loss"' in line]
    assert len(kept) < len(lines)
    (run / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    again = graft.finetune(dataclasses.replace(config("run", 8), resume=True, **patient))
    assert again.steps_done == report.steps_done < 8
    evaluated = [
        {
            e["step"]: e["eval_loss"]
            for e in read_metrics(folder / "metrics.jsonl")
            if "eval_loss" in e
        }
        for folder in (run, Path(unbroken.out))
    ]
    assert evaluated[0] == evaluated[1]


def test_and_when_a_kill_comes_between(config, monkeypatch) -> None:
    unbroken = config("unbroken", 6)
    graft.finetune(unbroken)
    run = stopped(config("run", 6), 3)
    note = loop.note_evaluation

    def killed(*arguments) -> None:
        raise Dies

    monkeypatch.setattr(loop, "note_evaluation", killed)
    again = dataclasses.replace(config("run", 6), resume=True)
    with pytest.raises(Dies):
        graft.finetune(again)
    monkeypatch.setattr(loop, "note_evaluation", note)
    graft.finetune(again)
    ours, theirs = states(run), states(Path(unbroken.out))
    assert {name: ours[name] for name in theirs} == theirs
    for file in ("adapter/adapter_model.safetensors",):
        assert (run / file).read_bytes() == (Path(unbroken.out) / file).read_bytes()
