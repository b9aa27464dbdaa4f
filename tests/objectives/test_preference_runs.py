"""Every objective through a whole run: train, go on, merge, report, evaluate."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import graft
from graft.api.evaluate import evaluate_model
from graft.api.events import Events
from graft.api.run import starting
from graft.api.run.folder import read_run_config
from graft.api.run.layout import REFERENCE
from graft.api.run.prepare import prepare
from graft.api.run.reference import model_before
from graft.calibrate.inputs import look_at_inputs
from graft.cli.main import main
from graft.errors import GraftError
from graft.objectives.reference import find_out, unknown
from graft.objectives.registry import OBJECTIVES
from graft.train.metrics import read_metrics

SIZES = {"steps": 8, "save_every": 4, "batch_size": 4, "max_length": 40, "rank": 4}
SIZES |= {"eval_fraction": 0.25}


def data_of(name, rows, preferences, labelled):
    holds = OBJECTIVES[name].holds[0]
    return str({"answers": rows, "pairs": preferences, "judgements": labelled}[holds])


def settings(name, base, data, out, **changes):
    teacher = {"teacher": str(base)} if OBJECTIVES[name].needs_teacher else {}
    options = {"objective": name, "learning_rate": 0.01, **SIZES, **teacher, **changes}
    return graft.TrainConfig(model=str(base), data=data, out=str(out), **options)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_a_run_goes_on_bit_for_bit_and_is_merged_and_told(
    name, tiny_base, rows, preferences, labelled, tmp_path
):
    data = data_of(name, rows, preferences, labelled)
    run, broken = tmp_path / "run", tmp_path / "broken"
    report = graft.finetune(settings(name, tiny_base, data, run))
    shutil.copytree(run, broken)
    for part in ("checkpoints/step-00000008", "adapter", "report.json"):
        target = broken / part
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    graft.finetune(settings(name, tiny_base, data, broken, resume=True))
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (run, broken)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert graft.merge(run, tmp_path / "merged").exact
    told = (run / "report.md").read_text(encoding="utf-8")
    assert f"held-out loss ({OBJECTIVES[name].unit})" in told
    assert report.kept_step in (4, 8)
    found = evaluate_model(str(run), data, max_length=40)
    assert found["rows"] == len((run.parent / data).read_text().splitlines())
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert "eval_loss" in last
    if OBJECTIVES[name].holds != ("answers",):
        assert report.reward_margin > report.reward_margin_before
        assert "held-out reward margin" in told
        assert found["reward_margin"] > 0 or name == "orpo"
    assert (run / REFERENCE).is_file() == OBJECTIVES[name].needs_reference


@pytest.mark.parametrize("method", ["merge_aware", "full"])
def test_dpo_raises_the_held_out_margin_by_every_kind_of_method(
    method, tiny_base, preferences, tmp_path
):
    run = tmp_path / "run"
    rank = {} if method == "full" else {"rank": 4}
    rate = 1e-3 if method == "full" else 0.01
    sizes = {**SIZES, "steps": 12}
    del sizes["rank"]
    config = graft.TrainConfig(
        model=str(tiny_base),
        data=str(preferences),
        out=str(run),
        method=method,
        objective="dpo",
        learning_rate=rate,
        **sizes,
        **rank,
    )
    report = graft.finetune(config)
    assert report.reward_margin_before == pytest.approx(0, abs=1e-3)
    assert report.reward_margin > report.reward_margin_before + 0.01
    assert report.reward_accuracy > 0.5
    found = evaluate_model(str(run), str(preferences), max_length=40)
    assert found["reward_margin"] > 0.01


def test_more_steps_find_out_about_more_rows(tiny_base, preferences, tmp_path):
    run = tmp_path / "run"
    graft.finetune(settings("dpo", tiny_base, str(preferences), run, steps=2))
    known = load_file(run / REFERENCE)["training"]
    before = int((~known[:, 0].isnan()).sum())
    assert before == 8, "only rows that the steps see"
    graft.finetune(settings("dpo", tiny_base, str(preferences), run, steps=6, resume=True))
    more = load_file(run / REFERENCE)["training"]
    assert int((~more[:, 0].isnan()).sum()) == 24
    same = ~known.isnan()
    assert (more[same] == known[same]).all()


def test_options_of_other_objectives_are_refused(tiny_base, rows, preferences, tmp_path):
    with pytest.raises(GraftError, match="--beta belongs to dpo and orpo and kto, not to --obj"):
        graft.finetune(settings("next_token", tiny_base, str(rows), tmp_path / "a", beta=0.2))
    with pytest.raises(GraftError, match=r"--label-smoothing is 0\.7; expected 0 up to"):
        made = settings("dpo", tiny_base, str(preferences), tmp_path / "a", label_smoothing=0.7)
        graft.finetune(made)
    with pytest.raises(GraftError, match="distill needs a teacher; give --teacher"):
        made = settings("distill", tiny_base, str(rows), tmp_path / "a", teacher=None)
        graft.finetune(made)
    with pytest.raises(GraftError, match="accepted keys of a row: prompt, chosen, rejected"):
        graft.finetune(settings("dpo", tiny_base, str(rows), tmp_path / "a"))
    assert not (tmp_path / "a").exists()


def test_a_teacher_with_another_vocabulary_is_refused(tiny_base, rows, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    file = other / "tokenizer.json"
    told = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = told["model"]["vocab"]
    one, two = sorted(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    file.write_text(json.dumps(told), encoding="utf-8")
    made = settings("distill", tiny_base, str(rows), tmp_path / "run", teacher=str(other))
    with pytest.raises(GraftError, match="has another vocabulary than"):
        graft.finetune(made)
    assert not (tmp_path / "run").exists()


def test_a_quantised_teacher_is_asked_for_by_name(tiny_base, rows, tmp_path):
    made = settings(
        "distill", tiny_base, str(rows), tmp_path / "run", teacher_format="nf4", steps=2
    )
    graft.finetune(made)
    entries = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert entries[0]["eval_divergence"] > 0, "the student is in another format"
    assert "perplexity" in entries[0]


def test_commands_show_both_sides_and_the_margin(tiny_base, preferences, capsys, tmp_path):
    data = ["data", str(preferences), str(tiny_base), "--objective", "dpo", "--rows", "1"]
    assert main(data[:1] + [str(tiny_base), str(preferences)] + data[3:]) == 0
    told = capsys.readouterr().out
    assert "chosen: " in told and "rejected: " in told
    graft.finetune(settings("dpo", tiny_base, str(preferences), tmp_path / "run", steps=2))
    words = ["eval", str(tmp_path / "run"), "--data", str(preferences), "--max-length", "40"]
    assert main(words) == 0
    assert "reward margin" in capsys.readouterr().out
    plan = ["plan", "--model", str(tiny_base), "--max-length", "40", "--json"]
    sizes = {}
    for name in ("next_token", "dpo", "distill"):
        more = ["--teacher", str(tiny_base)] if name == "distill" else []
        assert main([*plan, "--objective", name, *more]) == 0
        told = json.loads(capsys.readouterr().out)
        sizes[name] = {row["name"]: row["bytes"] for row in told["rows"]}
    assert sizes["dpo"]["activations"] == pytest.approx(
        2 * sizes["next_token"]["activations"], rel=0.05
    )
    assert sizes["distill"]["teacher"] > 0


@pytest.mark.parametrize(
    "options",
    [
        {"method": "lora", "init": "pissa"},
        {"method": "qlora", "init": "pissa"},
        {"method": "qalora", "bits": 8, "activations": "q8"},
    ],
)
def test_the_model_before_training_says_what_the_reference_holds(
    options, tiny_base, preferences, tmp_path
):
    run = tmp_path / "run"
    graft.finetune(settings("dpo", tiny_base, str(preferences), run, **options))
    known = load_file(run / REFERENCE)["held_out"]
    config = read_run_config(run)
    anew = dataclasses.replace(config, out=str(tmp_path / "anew"))
    held_out = prepare(anew, Events()).held_out.examples
    found = unknown(held_out)
    find_out(found, model_before(run, config).model, held_out, range(len(held_out)), 4)
    assert np.abs(found - known.numpy()).max() < 1e-3


def test_a_start_looks_at_each_answer_of_a_pair_by_itself(
    tiny_base, preferences, tmp_path, monkeypatch
):
    seen = []

    def looked(model, names, batches, look, on_layer):
        seen.extend(batches)
        look_at_inputs(model, names, batches, look, on_layer)

    monkeypatch.setattr(starting, "look_at_inputs", looked)
    run = tmp_path / "run"
    options = {"method": "lora", "init": "eva", "max_length": 24, "calibration_rows": 6}
    graft.finetune(settings("dpo", tiny_base, str(preferences), run, **options))
    assert len(seen) == 6 and max(batch.numel() for batch in seen) <= 24


def test_a_run_does_not_go_on_with_another_teacher(tiny_base, rows, tmp_path):
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(tiny_base, teacher)
    config = settings("distill", tiny_base, str(rows), run, teacher=str(teacher))
    graft.finetune(config)
    path = teacher / "model.safetensors"
    weights = {name: 2 * weight for name, weight in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(GraftError, match="is not the teacher that the run was begun with"):
        graft.finetune(dataclasses.replace(config, steps=12, resume=True))
    inputs = json.loads((run / "inputs.json").read_text(encoding="utf-8"))
    del inputs["teacher"]  # as earlier versions wrote it
    (run / "inputs.json").write_text(json.dumps(inputs), encoding="utf-8")
    assert graft.finetune(dataclasses.replace(config, steps=12, resume=True)).steps == 12
