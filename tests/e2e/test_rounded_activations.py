"""Runs that train with inputs rounded to 8 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import graft
from graft.errors import GraftError
from graft.layers.activations import compute_with, computes_with


def settings(base: Path, rows: Path, out: Path, **changes: object) -> graft.TrainConfig:
    values = {"steps": 4, "batch_size": 4, "max_length": 48, "learning_rate": 1e-2} | changes
    return graft.TrainConfig(model=str(base), data=str(rows), out=str(out), **values)


@pytest.mark.parametrize("method", ["qalora", "affine", "merge_aware"])
def test_a_run_remembers_what_it_was_trained_with(
    tiny_base: Path, rows: Path, tmp_path: Path, method: str
) -> None:
    run, merged = tmp_path / "run", tmp_path / "merged"
    graft.finetune(settings(tiny_base, rows, run, method=method, activations="q8"))
    trained, _ = graft.load(run)
    assert computes_with(trained) == "q8"
    report = graft.merge(run, merged)
    assert report.exact and report.max_logit_difference == 0.0
    model, _ = graft.load(merged)
    ids = torch.arange(60).reshape(2, 30) + 5
    with torch.no_grad():
        exact = model(input_ids=ids).logits
        compute_with(model, "q8")
        rounded = model(input_ids=ids).logits
        assert torch.equal(rounded, trained(input_ids=ids).logits)
        assert not torch.equal(rounded, exact)


def test_a_stopped_run_goes_on_with_rounded_inputs(
    tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    graft.finetune(settings(tiny_base, rows, whole, activations="q8_token"))
    given = {"activations": "q8_token", "save_every": 2}
    graft.finetune(settings(tiny_base, rows, parts, steps=2, **given))
    graft.finetune(settings(tiny_base, rows, parts, resume=True, activations="q8_token"))
    ids = torch.arange(60).reshape(2, 30) + 5
    for run in (whole, parts):
        assert computes_with(graft.load(run)[0]) == "q8_token"
    assert graft.load(parts)[0](input_ids=ids).logits.isfinite().all()


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_weights_that_are_no_integers_are_refused_before_anything_starts(
    tiny_base: Path, rows: Path, tmp_path: Path, method: str
) -> None:
    with pytest.raises(GraftError, match="--activations q8 is for weights that are integers"):
        graft.finetune(settings(tiny_base, rows, tmp_path / "run", method=method, activations="q8"))
    assert not (tmp_path / "run").exists()
