"""The end of a run: what is kept, how it goes on, what is said; and watching changes no bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import graft
from graft.api.evaluate import evaluate_model
from graft.api.events import Events
from graft.api.run import watched as watched_module
from graft.api.run.folder import load_any
from graft.api.run.report import RunReport
from graft.cli.main import main
from graft.errors import GraftError
from graft.train.trackers import Tracker

WORDS = "red green blue lamp chair table oak steel light heavy small large the is a of and".split()
RATES = {"lora": 0.06, "dora": 0.06, "qalora": 0.08, "full": 0.02, "merge_aware": 0.06}


def rising(method: str = "lora", **changes: Any) -> dict[str, Any]:
    """Return settings with which the held-out loss is lowest in the middle of 8 steps."""
    found = {"method": method, "steps": 8, "eval_every": 2, "learning_rate": RATES[method]}
    return found | {"warmup_fraction": 0.0} | changes


class Told(Events):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Eight rows to learn by heart, and held-out rows for which that helps only at first."""
    folder = tmp_path_factory.mktemp("data")
    training, held_out = [], []
    for number in range(8):
        prompt, completion = (
            " ".join(WORDS[(n * step + step) % len(WORDS)] for step in range(1, 9))
            for n in (number, number + 1)
        )
        reverse = " ".join(reversed(completion.split()))
        other = reverse if number % 3 else "0 ZEBRA? 91 jump; quick 7"
        training.append(json.dumps({"prompt": prompt, "completion": completion}))
        held_out.append(json.dumps({"prompt": prompt, "completion": other}))
    for name, lines in (("train", training), ("held", held_out)):
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "train.jsonl", folder / "held.jsonl"


@pytest.fixture
def train(tiny_base: Path, files: tuple[Path, Path], tmp_path: Path) -> Any:
    """A function from settings to the report of a run, which lies in tmp_path / name."""

    def trained(name: str = "run", events: Events | None = None, **settings: Any) -> RunReport:
        trackers = settings.pop("trackers", ())
        config = {
            "model": str(tiny_base),
            "data": str(files[0]),
            "eval_data": str(files[1]),
            "rank": 4,
            "batch_size": 4,
            "max_length": 48,
            "dtype": "float32",
            "out": str(tmp_path / name),
        }
        if settings.get("method") == "full":
            del config["rank"]
        return graft.finetune(
            graft.TrainConfig(**{**config, **settings}), events, trackers=trackers
        )

    return trained


def weights(run: Path) -> dict[str, torch.Tensor]:
    (file,) = [*run.glob("adapter/*.safetensors"), *run.glob("model/*.safetensors")]
    return load_file(file)


def evaluations(run: Path) -> dict[int, float]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return {one["step"]: one["eval_loss"] for one in found if "eval_loss" in one}


def best_of(run: Path) -> int:
    losses = evaluations(run)
    return min(list(losses)[1:], key=lambda step: losses[step])


def evaluated(model: Path, held_out: Path) -> float:
    """Return the held-out loss of what lies in a folder."""
    return evaluate_model(load_any(model, "float32"), str(held_out), max_length=48)["loss"]


@pytest.mark.parametrize("method", ["lora", "qalora", "full"])
def test_the_best_is_what_the_run_deploys(method, train, files, tmp_path) -> None:
    report = train(**rising(method))
    run = tmp_path / "run"
    losses = evaluations(run)
    assert report.kept_step == best_of(run) not in (0, 8), "or this test tests nothing"
    assert report.eval_loss == losses[report.kept_step] < report.eval_loss_last == losses[8]
    assert evaluated(run, files[1]) == pytest.approx(report.eval_loss, rel=1e-6)
    if method == "qalora":
        graft.merge(run, tmp_path / "merged")
        assert evaluated(tmp_path / "merged", files[1]) == pytest.approx(report.eval_loss, rel=1e-6)
    last = train("last", **rising(method, keep="last"))
    assert last.kept_step == 8 and last.eval_loss == losses[8]
    assert not (tmp_path / "last" / "best").exists()
    assert evaluated(tmp_path / "last", files[1]) == pytest.approx(losses[8], rel=1e-6)


class KilledError(Exception):
    """As if the process had ended."""


class Kills(Events):
    """Ends the process at an evaluation, before anything else is written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def metrics(self, metrics: dict[str, float]) -> None:
        if "eval_loss" in metrics and metrics["step"] == self.step:
            raise KilledError


@pytest.mark.parametrize(("method", "at"), [("lora", 4), ("merge_aware", 6), ("qalora", 8)])
def test_a_run_that_goes_on_ends_as_the_unbroken_one(method, at, train, tmp_path) -> None:
    extra = {"lora": {"dropout": 0.1}, "merge_aware": {"dense_fraction": 0.25}}.get(method, {})
    settings = rising(method, save_every=1, **extra)
    whole = train("whole", **settings)
    with pytest.raises(KilledError):
        train("broken", Kills(at), **settings)
    report = train("broken", **settings, resume=True)
    assert report.kept_step == whole.kept_step < 8, "or this test tests less"
    assert (report.eval_loss, report.drift) == (whole.eval_loss, whole.drift)
    ours, theirs = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_more_steps_remember_a_best_that_was_the_last(train, tmp_path) -> None:
    settings = rising("full", steps=2)
    first = train(**settings)
    assert first.kept_step == 2, "or this test tests nothing"
    before = weights(tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    text = config.read_text(encoding="utf-8")
    worse = text.replace("learning_rate: 0.02", "learning_rate: 1.0")
    assert worse != text
    config.write_text(worse, encoding="utf-8")
    report = train(**settings | {"resume": True, "steps": 6, "learning_rate": 1.0})
    assert report.kept_step == 2 and report.steps_done == 6
    after = weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_steps_before_the_rounding_are_not_kept(train, tmp_path) -> None:
    report = train(**rising("merge_aware", dense_fraction=0.75))
    assert best_of(tmp_path / "run") <= 6 and report.kept_step == 8


def test_patience_ends_early_and_more_of_it_goes_on(train, tmp_path) -> None:
    settings = rising(steps=40)
    report = train(patience=2, **settings)
    run = tmp_path / "run"
    losses = evaluations(run)
    assert report.steps_done == report.kept_step + 4 == max(losses) < 40
    assert report.ended.startswith(f"stopped early after step {report.steps_done} of 40")
    assert any("--patience 4" in line for line in report.next_steps)
    checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert checkpoints[-1] == f"step-{report.steps_done:08d}"
    adapter = weights(run)
    again = train(patience=2, resume=True, **settings)
    for name in ("steps_done", "kept_step", "eval_loss", "ended", "next_steps", "drift"):
        assert getattr(again, name) == getattr(report, name), name
    assert all(torch.equal(adapter[name], tensor) for name, tensor in weights(run).items())
    longer = train(patience=3, resume=True, **settings)
    assert longer.steps_done >= report.steps_done + 2
    straight = train("straight", patience=3, **settings)
    assert (longer.steps_done, longer.kept_step) == (straight.steps_done, straight.kept_step)
    assert evaluations(run) == evaluations(tmp_path / "straight")


def test_a_kept_best_that_is_damaged_is_told_with_the_way_out(train, tmp_path) -> None:
    report = train(**rising())
    run = tmp_path / "run"
    file = run / "best" / f"step-{report.kept_step:08d}" / "parameters.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (run / "status.json").write_text("{}", encoding="utf-8")
    shutil.rmtree(run / "adapter")
    with pytest.raises(GraftError, match="--resume --keep last"):
        train(**rising(resume=True))
    assert train(**rising(resume=True, keep="last")).kept_step == 8


def test_evaluations_by_epochs(train, tmp_path) -> None:
    train(epochs=4.0, batch_size=3, eval_epochs=1.0)  # 8 rows are 2 2/3 steps of 3
    assert list(evaluations(tmp_path / "run")) == [0, 3, 6, 8, 11]


def test_worse_than_before_is_said_everywhere(train, tmp_path, capsys, tiny_base, files) -> None:
    run = tmp_path / "worse"
    words = (
        f"train --model {tiny_base} --data {files[0]} --eval-data {files[1]} --out {run} --steps 3 "
        "--batch-size 4 --max-length 48 --method full --learning-rate 1 --dtype float32"
    )
    assert main(words.split()) == 0
    printed = capsys.readouterr().out
    assert "worse than before training" in printed and "--learning-rate 0.25 (it was 1)" in printed
    assert "graft export" not in printed, "it is nothing to deploy"
    text = (run / "report.md").read_text(encoding="utf-8")
    assert "worse than before training |" in text and "What to do next:" in text
    assert main(["export", str(run), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    assert "(worse than before training)" in card and "of step 3, the last" in card
    assert "drift from the base on general text" in card


class Kept(Tracker):
    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.texts: list[tuple[int, int]] = []
        self.report: Any = None

    def on_metrics(self, metrics):
        self.metrics.append(dict(metrics))

    def on_text(self, step, texts):
        self.texts.append((step, len(texts)))

    def on_end(self, report):
        self.report = report


class Fails(Tracker):
    def on_metrics(self, metrics):
        raise OSError("no room")


def test_watching_changes_no_bit(train, tmp_path, monkeypatch) -> None:
    tracker, events = Kept(), Told()
    settings = {"steps": 6, "eval_every": 3, "dropout": 0.2, "method": "lora"}
    watched = train("watched", events, samples=2, trackers=[tracker, Fails()], **settings)
    lines = (tmp_path / "watched" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert tracker.metrics == [json.loads(line) for line in lines]
    assert tracker.texts == [(0, 2), (3, 2), (6, 2)] and tracker.report["steps"] == 6
    assert sum("Fails failed (OSError: no room)" in note for note in events.notes) == 1
    samples = (tmp_path / "watched" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in samples] == [0, 0, 3, 3, 6, 6]
    assert {"prompt", "text", "reference"} < set(json.loads(samples[0]))
    assert watched.drift is not None and watched.drift.kl > 0

    monkeypatch.setattr(watched_module, "general_windows", _fails)
    monkeypatch.setattr("graft.train.gates.OutputProbe._digest", lambda self: object())
    alone = train("alone", **settings)
    assert alone.drift is None
    ours, theirs = weights(tmp_path / "watched"), weights(tmp_path / "alone")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert evaluations(tmp_path / "watched") == evaluations(tmp_path / "alone")


def _fails(*_: object, **__: object) -> None:
    raise GraftError("none")


def test_a_training_that_moves_nothing_is_stopped(train, tmp_path) -> None:
    with pytest.raises(GraftError, match="step 10: the model computes, bit for bit"):
        train(method="full", dtype="bfloat16", steps=12, learning_rate=1e-12)
    events = Told()
    train("short", events, method="full", dtype="bfloat16", steps=3, learning_rate=1e-12)
    assert any("they are too few or too small" in note for note in events.notes)


def test_what_cannot_be_watched_is_told_before_anything_is_written(train, tmp_path) -> None:
    text = tmp_path / "rows.txt"
    text.write_text("red lamp\n\nblue chair\n\nold oak\n", encoding="utf-8")
    with pytest.raises(GraftError) as told:
        train(
            steps=2,
            samples=3,
            data=str(text),
            eval_data=None,
            patience=1,
            track=("tensorbord",),
        )
    assert "unknown tracker 'tensorbord'; did you mean 'tensorboard'?" in str(told.value)
    assert "--samples 3: text rows have no prompt" in str(told.value)
    with pytest.raises(GraftError) as told:
        train(steps=2, patience=1, general_text=str(tmp_path / "none.txt"), min_improvement=-1.0)
    assert "--patience 1: nothing is evaluated between" in str(told.value)
    assert "--min-improvement is -1.0" in str(told.value) and "none.txt" in str(told.value)
    with pytest.raises(GraftError, match="--eval-every and --eval-epochs are both given"):
        train(steps=2, eval_every=1, eval_epochs=0.5)
    assert not (tmp_path / "run").exists()
