"""LoRA inside the rounding of NF4: another grid than integers, with the same promises."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import graft
from graft.api.config import PlanConfig
from graft.api.events import Events
from graft.api.export import next_export
from graft.api.plan import plan
from graft.api.run.folder import load_any
from graft.train.metrics import read_metrics

STEPS, DENSE = 6, 0.5


def config(base: Path, rows: Path, out: Path, **options) -> graft.TrainConfig:
    given = {"method": "merge_aware", "format": "nf4", "dense_fraction": DENSE, "dtype": "float32"}
    return graft.TrainConfig(
        model=str(base),
        data=str(rows),
        out=str(out),
        steps=STEPS,
        batch_size=4,
        rank=4,
        learning_rate=2e-2,
        calibration_rows=8,
        **given | options,
    )


def logits(folder: Path) -> torch.Tensor:
    loaded = load_any(folder, dtype="float32")
    with torch.no_grad():
        return loaded.model(torch.arange(24)[None] + 5).logits


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_merged_folder_is_the_trained_model_bit_for_bit(
    double_quant, tiny_base, rows, tmp_path
) -> None:
    run, merged = tmp_path / "run", tmp_path / "merged"
    graft.finetune(config(tiny_base, rows, run, double_quant=double_quant))
    report = graft.merge(run, merged)
    assert report.exact and report.max_logit_difference == 0.0
    layers = json.loads((merged / "graft.json").read_text())["layers"]
    assert {layer["format"] for layer in layers.values()} == {"nf4"}
    assert {layer["double_quant"] for layer in layers.values()} == {double_quant}
    trained = logits(run)
    assert torch.equal(logits(merged), trained)
    # What was trained has chosen other codes than those of the rounded base.
    base, deployed = (load_file(at / "model.safetensors") for at in (run / "base", merged))
    assert "weight" in {name.rpartition(".")[2] for name in base if "q_proj" in name}
    assert not torch.equal(logits(tiny_base), trained)
    assert {t.dtype for n, t in deployed.items() if n.endswith("codes")} == {torch.uint8}


def test_a_resumed_run_is_the_unbroken_one(tiny_base, rows, tmp_path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    graft.finetune(config(tiny_base, rows, whole, save_every=1))

    class Stop(Exception):  # noqa: N818
        pass

    class Interrupting(Events):
        def metrics(self, metrics) -> None:
            if metrics.get("step") == 5:
                raise Stop

    for stop in (Interrupting(), None):
        try:
            settings = config(tiny_base, rows, broken, save_every=1, resume=stop is None)
            graft.finetune(settings, stop)
        except Stop:
            assert stop is not None
    one, other = (
        load_file(run / "adapter" / "adapter_model.safetensors") for run in (whole, broken)
    )
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    losses = [
        [e.get("loss") for e in read_metrics(run / "metrics.jsonl")] for run in (whole, broken)
    ]
    assert losses[0] == losses[1]


def test_it_learns_inside_the_rounding(tiny_base, rows, tmp_path) -> None:
    report = graft.finetune(config(tiny_base, rows, tmp_path / "run", dense_fraction=0.0))
    assert report.eval_loss < report.eval_loss_before
    assert report.bits_per_weight < 4.6


def test_the_plan_knows_the_weights_beside_the_codes(tiny_base) -> None:
    def frozen(**options) -> int:
        memory = plan(PlanConfig(model=str(tiny_base), dtype="float32", **options))
        return next(row.bytes for row in memory.rows if row.name == "frozen weights")

    dense = frozen(method="lora")
    assert frozen(method="merge_aware", format="nf4") == dense + dense // 64  # an absmax a block


@pytest.mark.parametrize("name", ["nf4", "int", None])
def test_a_finished_run_takes_the_same_words_again(name, tiny_base, rows, tmp_path) -> None:
    given = config(tiny_base, rows, tmp_path / "run", format=name, save_every=STEPS)
    graft.finetune(given)
    trained = logits(tmp_path / "run")
    graft.finetune(dataclasses.replace(given, resume=True))
    assert torch.equal(logits(tmp_path / "run"), trained)


@pytest.mark.parametrize(("name", "words"), [("nf4", "--to hf"), ("int", "--to gguf")])
def test_what_comes_next_can_be_done(name, words, tiny_base, rows, tmp_path) -> None:
    run = tmp_path / "run"
    graft.finetune(config(tiny_base, rows, run, format=name))
    command = next_export(run)
    assert words in command
    target, out = command.split()[-3], tmp_path / command.split()[-1]
    assert graft.export_model(run, target, out).path == out


def test_a_grid_without_offsets_does_not_move(tiny_base, rows, tmp_path) -> None:
    with pytest.raises(graft.GraftError, match="--grid-rank 2: nf4 weights have no offsets"):
        graft.finetune(config(tiny_base, rows, tmp_path / "run", grid_rank=2))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["int8", "dense"])
def test_what_is_no_grid_is_refused(name, tiny_base, rows, tmp_path) -> None:
    with pytest.raises(graft.GraftError, match=f"{name} is no grid"):
        graft.finetune(config(tiny_base, rows, tmp_path / "run", format=name))
