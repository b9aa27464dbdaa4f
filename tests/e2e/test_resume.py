"""Going on with a run: from where it was stopped, and from what is whole."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest
from resuming import Heard, adapter, again, killed_after, losses, settings

import graft
from graft.api.run.status import read_status
from graft.errors import GraftError
from graft.train.stop import Stop, StoppedError

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
