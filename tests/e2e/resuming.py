"""What the tests of going on with a run have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

import graft
from graft.api.events import Events
from graft.api.run.folder import read_run_config
from graft.train.metrics import read_metrics


def settings(base: Path, rows: Path, out: Path, **changes: object) -> graft.TrainConfig:
    values = {"steps": 6, "batch_size": 4, "max_length": 48, "learning_rate": 1e-2, "rank": 4}
    values |= {"method": "lora", "save_every": 2, "dtype": "float32"}
    return graft.TrainConfig(model=str(base), data=str(rows), out=str(out), **(values | changes))


def again(run: Path, **changes: object) -> graft.TrainConfig:
    return dataclasses.replace(read_run_config(run), out=str(run), resume=True, **changes)


class Heard(Events):
    """Remembers what was told and which steps were done; `at` is called with each step."""

    def __init__(self, at: Callable[[int], None] = lambda step: None) -> None:
        self.notes: list[str] = []
        self.steps: list[int] = []
        self.at = at

    def note(self, text: str) -> None:
        self.notes.append(text)

    def metrics(self, metrics: dict[str, float]) -> None:
        if "loss" in metrics:
            self.steps.append(int(metrics["step"]))
            self.at(int(metrics["step"]))

    def told(self, words: str) -> bool:
        return any(words in note for note in self.notes)


class Dies(BaseException):
    """Stands for the end of the process."""


def killed_after(step: int, config: graft.TrainConfig) -> None:
    def die(done: int) -> None:
        if done == step:
            raise Dies

    with pytest.raises(Dies):
        graft.finetune(config, Heard(die))


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def losses(run: Path) -> list[tuple[int, float, float]]:
    entries = read_metrics(run / "metrics.jsonl")
    return [(e["step"], e.get("loss", 0), e.get("eval_loss", 0)) for e in entries]


def rates(run: Path) -> list[float]:
    return [e["learning_rate"] for e in read_metrics(run / "metrics.jsonl") if "loss" in e]
