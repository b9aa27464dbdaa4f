"""Going on with a run: from where it was stopped, from what is whole, with what was given."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import graft
from graft.api.events import Events
from graft.api.run.folder import read_run_config
from graft.api.run.resume import owned_run
from graft.api.run.status import read_status
from graft.api.runs import list_runs
from graft.errors import GraftError
from graft.train.loop import read_metrics
from graft.train.stop import Stop, StoppedError


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


@pytest.fixture(scope="module")
def whole(tiny_base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    graft.finetune(settings(tiny_base, rows, run))
    return run


@pytest.fixture
def broken(whole: Path, tiny_base: Path, rows: Path, tmp_path: Path) -> Path:
    """The same run, killed after step 5: it has checkpoints of steps 2 and 4."""
    run = tmp_path / "run"
    killed_after(5, settings(tiny_base, rows, run))
    return run


# Stopping -----------------------------------------------------------------------------------------


STOPS = {  # after how many steps, and at which look at the wish after them
    "after a step": (3, 1),
    "in an evaluation": (3, 2),
    "between two batches": (3, 3),
    "in the first evaluation": (0, 1),
    "while it rounds": (3, 3),
}


@pytest.mark.parametrize("where", STOPS)
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(where, tiny_base, rows, tmp_path):
    common = {"grad_accum": 2, "eval_every": 3, "checkpoints": False, "save_every": None}
    if where == "while it rounds":
        common |= {"method": "merge_aware", "dense_fraction": 0.5}
    unbroken, run = tmp_path / "unbroken", tmp_path / "stopped"
    graft.finetune(settings(tiny_base, rows, unbroken, **common))
    events, steps = Heard(), STOPS[where][0]

    class Asked(Stop):
        looks = 0

        def check(self) -> None:
            self.looks += len(events.steps) == steps
            self.asked = self.looks == STOPS[where][1]
            super().check()

    with pytest.raises(StoppedError, match="graft train --resume --out") as stopped:
        graft.finetune(settings(tiny_base, rows, run, **common), events, Asked())
    status = read_status(run)
    assert status is not None and status.state == "interrupted"
    assert stopped.value.step == status.step == steps
    assert (run / "checkpoints").is_dir() == (steps > 0)
    assert not (run / "base").is_dir(), "it was not rounded to the end"
    graft.finetune(again(run))
    assert adapter(run) == adapter(unbroken)
    assert losses(run) == losses(unbroken)
    status = read_status(run)
    assert status is not None and status.state == "finished"


def test_nothing_heeds_a_stop_before_and_after_the_training(tiny_base, rows, tmp_path):
    stop = Stop()
    heeded: list[bool] = []

    class Watches(Heard):
        def note(self, text: str) -> None:
            heeded.append(stop.heeded)

    graft.finetune(
        settings(tiny_base, rows, tmp_path / "run"),
        Watches(lambda _: heeded.append(stop.heeded)),
        stop,
    )
    assert heeded.count(True) == 6 and not stop.heeded


# From what is whole -------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(broken, whole):
    newest = broken / "checkpoints" / "step-00000004" / "state.safetensors"
    content = bytearray(newest.read_bytes())
    content[-9] ^= 4
    newest.write_bytes(content)
    events = Heard()
    graft.finetune(again(broken), events)
    assert events.told("a checkpoint cannot be used") and events.told("going on from")
    assert events.steps == [3, 4, 5, 6]
    assert adapter(broken) == adapter(whole) and losses(broken) == losses(whole)


def test_lost_metrics_stop_no_report(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "adapter")
    (run / "metrics.jsonl").write_text("")
    events = Heard()
    report = graft.finetune(again(run), events)
    assert events.told("metrics.jsonl is damaged") and not events.steps
    assert report.loss == losses(whole)[-2][1] and report.eval_loss == losses(whole)[-1][2]
    assert adapter(run) == adapter(whole)


def test_without_a_whole_checkpoint_the_run_is_begun_anew(broken, whole, tiny_base, rows):
    for state in broken.glob("checkpoints/*/state.json"):
        state.write_text("")
    events = Heard()
    given = settings(tiny_base, rows, broken, resume=True)
    graft.finetune(given, events)
    assert events.told("the run is begun anew")
    assert events.steps == [1, 2, 3, 4, 5, 6]
    assert adapter(broken) == adapter(whole) and losses(broken) == losses(whole)


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "all but the configuration"])
def test_with_all_settings_a_run_is_begun_whatever_is_left_of_it(
    left, broken, whole, tiny_base, rows
):
    if left == "all but the configuration":
        (broken / "config.yaml").write_bytes(bytes(100))
    else:
        shutil.rmtree(broken)
    if left == "an empty folder":
        broken.mkdir()
    events = Heard()
    graft.finetune(settings(tiny_base, rows, broken, resume=True), events)
    assert events.told("begun")
    assert adapter(broken) == adapter(whole) and losses(broken) == losses(whole)


def test_a_base_of_settings_that_are_lost_is_made_anew(tiny_base, rows, tmp_path):
    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    graft.finetune(settings(tiny_base, rows, unbroken, method="qalora", bits=3, steps=2))
    killed_after(1, settings(tiny_base, rows, run, method="qalora", bits=4, steps=2))
    (run / "config.yaml").unlink()
    given = settings(tiny_base, rows, run, method="qalora", bits=3, steps=2, resume=True)
    graft.finetune(given)
    for file in ("adapter/adapter_model.safetensors", "base/model.safetensors"):
        assert (run / file).read_bytes() == (unbroken / file).read_bytes()


def test_a_folder_of_other_things_is_left_alone(tiny_base, rows, tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(GraftError, match="no run folder .*letter.txt"):
        graft.finetune(settings(tiny_base, rows, tmp_path, resume=True))
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_metrics_and_status_that_are_lost_stop_nothing(broken, whole):
    (broken / "metrics.jsonl").write_bytes(b"\x00\xff\n[1]\n")
    for name in ("status.json", "prompt.json", "inputs.json"):
        (broken / name).write_text('{"state": 1}')
    (broken / ".config.yaml.0123456789ab.part").write_text("what a killed writer left")
    report = graft.finetune(again(broken))
    assert adapter(broken) == adapter(whole)
    assert report.steps == 6 and report.eval_loss == losses(whole)[-1][2]
    assert json.loads((broken / "prompt.json").read_text())["kind"] == "prompt"
    assert not list(broken.rglob("*.part"))


def test_damaged_samples_are_begun_anew(tiny_base, rows, tmp_path):
    run = tmp_path / "run"
    common = {"samples": 1, "eval_every": 2, "steps": 4}
    killed_after(3, settings(tiny_base, rows, run, **common))
    (run / "samples.jsonl").write_bytes(b'{"step": 0, "text": "\xff')
    graft.finetune(again(run))
    lines = (run / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4]


@pytest.mark.parametrize("method", ["qalora", "merge_aware"])
def test_a_damaged_base_is_made_anew(method, tiny_base, rows, tmp_path):
    common = {"method": method, "dense_fraction": 0.5 if method == "merge_aware" else None}
    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    graft.finetune(settings(tiny_base, rows, unbroken, **common))
    killed_after(5, settings(tiny_base, rows, run, **common))
    file = run / "base" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 4
    file.write_bytes(content)
    events = Heard()
    graft.finetune(again(run), events)
    assert events.told("is damaged, and is made anew")
    # merge_aware has rounded it after step 3, so what was trained on it is done again.
    assert events.steps == ([3, 4, 5, 6] if method == "merge_aware" else [5, 6])
    assert adapter(run) == adapter(unbroken)
    assert file.read_bytes() == (unbroken / "base" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("unreadable", ["base/model.safetensors", "adapter", "inputs.json"])
def test_what_the_system_did_not_read_is_not_taken_as_damaged(
    unreadable, tiny_base, rows, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    graft.finetune(settings(tiny_base, rows, run, method="qalora", steps=2))
    before = sorted(path for path in run.rglob("*") if path.name != ".lock")
    opened = os.open

    def fails(path, *arguments, **more):
        if str(path).startswith(str(run / unreadable)):
            raise OSError(errno.EIO, "Input/output error")
        return opened(path, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fails)
        with pytest.raises(GraftError, match=f"{unreadable}.*cannot be read: Input/output error"):
            graft.finetune(again(run, steps=4))
    assert sorted(path for path in run.rglob("*") if path.name != ".lock") == before
    events = Heard()
    graft.finetune(again(run, steps=4), events)
    assert events.steps == [3, 4]


# A run that has finished --------------------------------------------------------------------------


def test_a_finished_run_has_nothing_to_do(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    events = Heard()
    report = graft.finetune(again(run), events)
    assert events.told("has finished its 6 steps") and not events.steps
    assert report == graft.finetune(again(run, epochs=6 * 4 / 38, steps=None))
    assert report.steps == 6


@pytest.mark.parametrize("lost", ["report.json", "adapter", "export"])
def test_what_a_finished_run_has_lost_is_made_again(lost, tiny_base, rows, tmp_path):
    run = tmp_path / "run"
    graft.finetune(settings(tiny_base, rows, run, export=("peft",)))
    before = adapter(run)
    path = run / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    events = Heard()
    graft.finetune(again(run), events)
    assert not events.steps, "all steps are in the checkpoint"
    assert adapter(run) == before
    assert json.loads((run / "report.json").read_text())["steps"] == 6
    assert list((run / "export").iterdir())


def test_a_finished_run_takes_more_steps(tiny_base, rows, tmp_path, whole):
    run = tmp_path / "run"
    graft.finetune(settings(tiny_base, rows, run, steps=2, export=("peft",)))
    exported = next(run.glob("export/*/adapter_model.safetensors"))
    before, seconds = exported.read_bytes(), read_status(run).parts[0].seconds
    events = Heard()
    report = graft.finetune(again(run, steps=6), events)
    assert events.steps == [3, 4, 5, 6] and events.told("6 steps instead of 2")
    assert read_run_config(run).steps == report.steps == 6
    assert exported.read_bytes() != before, "the export of the earlier part would be stale"
    assert report.seconds > seconds and len(read_status(run).parts) == 2
    rates = {
        e["step"]: e["learning_rate"] for e in read_metrics(run / "metrics.jsonl") if "loss" in e
    }
    unbroken = tmp_path / "unbroken"
    graft.finetune(settings(tiny_base, rows, unbroken))
    expected = read_metrics(unbroken / "metrics.jsonl")
    assert all(
        rates[e["step"]] == e["learning_rate"] for e in expected if e["step"] > 2 and "loss" in e
    )
    config = (run / "config.yaml").read_text()
    with pytest.raises(GraftError, match="has done 6 steps; 4 are fewer"):
        graft.finetune(again(run, steps=4))
    assert (run / "config.yaml").read_text() == config
    graft.finetune(again(run, steps=None, epochs=1.0))  # 10 steps
    assert read_run_config(run).steps == 10


def test_a_result_never_lies_beside_the_report_of_another(tiny_base, rows, tmp_path, monkeypatch):
    run = tmp_path / "run"
    graft.finetune(settings(tiny_base, rows, run, steps=2))

    def die(*arguments: object) -> None:
        raise Dies

    with monkeypatch.context() as patch:
        patch.setattr("graft.api.finetune.write_report", die)
        with pytest.raises(Dies):
            graft.finetune(again(run, steps=4))
    assert (run / "adapter").is_dir()
    assert not any((run / name).exists() for name in ("report.json", "report.md", "plots"))
    assert graft.finetune(again(run)).steps_done == 4


def test_steps_that_were_dense_stay_so_when_there_are_more(tiny_base, rows, tmp_path):
    run = tmp_path / "run"
    common = {"method": "merge_aware", "dense_fraction": 0.5, "steps": 4}
    graft.finetune(settings(tiny_base, rows, run, **common))
    base = (run / "base" / "model.safetensors").read_bytes()
    killed_after(7, again(run, steps=8))
    assert read_run_config(run).dense_fraction == 0.25
    events = Heard()
    graft.finetune(again(run), events)
    assert events.steps == [7, 8]
    assert (run / "base" / "model.safetensors").read_bytes() == base, "it was rounded after step 2"
    assert graft.merge(run, tmp_path / "merged").exact


def test_with_fewer_steps_the_weights_are_still_rounded(tiny_base, rows, tmp_path):
    run = tmp_path / "run"
    common = {"method": "merge_aware", "dense_fraction": 0.5, "steps": 8}
    killed_after(5, settings(tiny_base, rows, run, **common))
    config = (run / "config.yaml").read_text()
    with pytest.raises(GraftError, match="4 steps before its weights are rounded"):
        graft.finetune(again(run, steps=4))
    assert (run / "config.yaml").read_text() == config
    events = Heard()
    graft.finetune(again(run, steps=5), events)
    assert events.steps == [5]
    assert read_run_config(run).dense_fraction == 0.8
    assert graft.merge(run, tmp_path / "merged").exact


def test_a_finished_run_without_checkpoints_cannot_be_given_more(tiny_base, rows, tmp_path):
    run = tmp_path / "run"
    graft.finetune(settings(tiny_base, rows, run, checkpoints=False, save_every=None))
    assert not (run / "checkpoints").exists()
    before = adapter(run)
    with pytest.raises(GraftError, match="has no checkpoint to go on from"):
        graft.finetune(again(run, steps=9))
    assert adapter(run) == before
    graft.finetune(again(run))


def test_checkpoints_are_written_by_time_and_at_the_end(tiny_base, rows, tmp_path):
    seldom, often = tmp_path / "seldom", tmp_path / "often"
    graft.finetune(settings(tiny_base, rows, seldom, save_every=None, steps=3))
    assert [path.name for path in (seldom / "checkpoints").iterdir()] == ["step-00000003"]
    killed_after(3, settings(tiny_base, rows, often, save_every=None, save_minutes=1e-9))
    names = sorted(path.name for path in (often / "checkpoints").iterdir())
    assert names == ["step-00000001", "step-00000002"]


# The same settings and inputs ---------------------------------------------------------------------


def test_other_settings_are_refused_even_when_they_are_the_defaults(tiny_base, rows, tmp_path):
    run = tmp_path / "run"
    killed_after(3, settings(tiny_base, rows, run, seed=3))
    with pytest.raises(GraftError) as told:
        graft.finetune(again(run, seed=0, batch_size=16))
    assert "seed is 0, the run was begun with 3" in str(told.value)
    assert "batch_size is 16, the run was begun with 4" in str(told.value)
    graft.finetune(again(run, eval_every=2, save_every=None, checkpointing="auto"))
    assert (run / "adapter").is_dir()


def test_the_content_of_data_and_model_counts_and_not_their_place(
    tiny_base, rows, tmp_path, broken, whole
):
    base, data = tmp_path / "moved-base", tmp_path / "moved.jsonl"
    shutil.copytree(tiny_base, base)
    lines = rows.read_text().splitlines()
    data.write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    weights = load_file(base / "model.safetensors")
    changed = {name: tensor + (name.endswith("norm.weight")) for name, tensor in weights.items()}
    save_file(changed, base / "model.safetensors", metadata={"format": "pt"})
    before = sorted(path.read_bytes() for path in broken.rglob("*") if path.is_file())
    with pytest.raises(GraftError) as told:
        graft.finetune(again(broken, data=str(data), model=str(base)))
    assert "moved.jsonl is not the data that the run was begun with" in str(told.value)
    assert "moved-base is not the model that the run was begun with" in str(told.value)
    assert sorted(path.read_bytes() for path in broken.rglob("*") if path.is_file()) == before
    data.write_bytes(rows.read_bytes())
    shutil.copy(tiny_base / "model.safetensors", base)
    graft.finetune(again(broken, data=str(data), model=str(base)))
    assert adapter(broken) == adapter(whole)
    assert json.loads((broken / "base.json").read_text())["path"] == str(base)
    assert read_run_config(broken).data == str(data)


def test_the_tokenizer_counts_too(tiny_base, rows, tmp_path, broken, whole):
    base = tmp_path / "moved-base"
    shutil.copytree(tiny_base, base)
    changed = base / "tokenizer_config.json"
    content = changed.read_bytes()
    changed.write_text(json.dumps(json.loads(content) | {"model_max_length": 77}))
    (base / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(
        GraftError,
        match="moved-base has not the tokenizer .*: chat_template.jinja, tokenizer_config.json ch",
    ):
        graft.finetune(again(broken, model=str(base)))
    inputs = json.loads((broken / "inputs.json").read_text())
    del inputs["tokenizer"]  # as earlier versions wrote it, of which it is not known
    (broken / "inputs.json").write_text(json.dumps(inputs))
    changed.write_bytes(content)
    graft.finetune(again(broken, model=str(base)))
    assert adapter(broken) == adapter(whole)
    assert "tokenizer.json" in json.loads((broken / "inputs.json").read_text())["tokenizer"]


def test_going_on_changes_no_setting(broken):
    before = (broken / "config.yaml").read_text()
    graft.finetune(again(broken))
    assert (broken / "config.yaml").read_text() == before


# What a folder says -------------------------------------------------------------------------------


def test_a_run_that_fails_says_so_and_keeps_the_batch(tiny_base, rows, tmp_path):
    run = tmp_path / "run"
    config = settings(tiny_base, rows, run, learning_rate=1e30, steps=20, max_grad_norm=1.0)
    with pytest.raises(GraftError, match="not finite.*failed-batch.safetensors: .*rows.jsonl:"):
        graft.finetune(config)
    status = read_status(run)
    assert status is not None and status.state == "failed"
    assert status.error is not None and "is not finite" in status.error
    assert len(status.failed_rows) == 4 and all("rows.jsonl:" in row for row in status.failed_rows)
    tensors = load_file(run / "failed-batch.safetensors")
    assert tensors["0.input_ids"].shape[0] == 4
    assert tensors["0.labels"].dtype == torch.int64
    for call in (graft.load, lambda path: graft.merge(path, tmp_path / "merged")):
        with pytest.raises(GraftError, match="a run that failed.*not finite.*--resume --out"):
            call(run)
    with pytest.raises(GraftError, match="exists already, a run that failed.*--resume --out"):
        graft.finetune(config)


def test_a_run_that_was_killed_is_told_from_one_that_is_running(broken):
    status = json.loads((broken / "status.json").read_text())
    (broken / "status.json").write_text(json.dumps(status | {"state": "running"}))
    with pytest.raises(GraftError, match="was killed, .*checkpoint at step 4 of 6.*--resume"):
        graft.load(broken)
    (row,) = list_runs([broken])
    assert row.status == "killed"
    with owned_run(broken):
        with pytest.raises(GraftError, match="a run that is being worked on"):
            graft.load(broken)
        (row,) = list_runs([broken])
        assert row.status == "running"


def test_a_run_has_one_owner(broken, whole):
    with owned_run(broken), pytest.raises(GraftError, match="is in use by process"):
        graft.finetune(again(broken))
    graft.finetune(again(broken))
    assert adapter(broken) == adapter(whole)
    assert not (broken / ".lock").exists()
