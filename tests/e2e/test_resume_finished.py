"""Going on with a run that has finished, with what was given, and what a folder says of itself."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from resuming import Dies, Heard, adapter, again, killed_after, settings
from safetensors.torch import load_file, save_file

import graft
from graft.api.run.folder import read_run_config
from graft.api.run.resume import owned_run
from graft.api.run.status import read_status
from graft.api.runs import list_runs
from graft.errors import GraftError
from graft.train.metrics import read_metrics

# A run that has finished --------------------------------------------------------------------------


def test_a_finished_run_has_nothing_to_do(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    events = Heard()
    report = graft.finetune(again(run), events)
    assert events.told("has finished its 6 steps") and not events.steps
    assert report == graft.finetune(again(run, epochs=6 * 4 / 38, steps=None))
    assert report.steps == 6


def test_a_finished_run_is_not_taken_for_one_on_other_data(tiny_base, rows, tmp_path):
    run, data = tmp_path / "run", tmp_path / "live.jsonl"
    shutil.copy(rows, data)
    graft.finetune(settings(tiny_base, data, run))
    data.write_text(data.read_text().replace("e", "a"))
    with pytest.raises(GraftError, match="is not the data that the run was begun with: its SHA"):
        graft.finetune(again(run))
    data.unlink()
    assert graft.finetune(again(run)).steps == 6


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
