"""Full training, of all weights and of a part."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from unittest.mock import Mock

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import graft
from graft.api.events import Events


def settings(base: Path, rows: Path, out: Path, **changes: object) -> graft.TrainConfig:
    values = {"steps": 4, "batch_size": 4, "max_length": 48, "learning_rate": 1e-2} | changes
    return graft.TrainConfig(model=str(base), data=str(rows), out=str(out), **values)


def test_full_training_and_subset_training(tiny_base, rows, tmp_path):
    before = AutoModelForCausalLM.from_pretrained(tiny_base).state_dict()
    graft.finetune(settings(tiny_base, rows, tmp_path / "full", method="full"))
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "full" / "model").state_dict()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    some = settings(tiny_base, rows, tmp_path / "some", method="full", targets=("v_proj",))
    graft.finetune(some)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "some" / "model").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.self_attn.v_proj.weight" for i in range(2)}


def test_a_subset_by_words_trains_alone_resumes_and_is_counted(tiny_base, rows, tmp_path):
    before = AutoModelForCausalLM.from_pretrained(tiny_base).state_dict()
    run, events = tmp_path / "run", Mock(spec=Events)
    words = ("layers.1-1.mlp, norms",)
    config = settings(tiny_base, rows, run, method="full", train=words, steps=2, save_every=1)
    report = graft.finetune(config, events)
    mlp = [f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    chosen = {*mlp, *(name for name in before if "norm" in name)}
    after = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == chosen
    count = sum(before[name].numel() for name in chosen)
    assert report.trainable_parameters == count
    assert f"{count:,} of {report.total_parameters:,} (" in (run / "report.md").read_text()
    notes = [call.args[0] for call in events.note.call_args_list]
    assert any(note.startswith(f"trains {len(chosen)} of ") for note in notes)
    state = load_file(run / "checkpoints" / "step-00000002" / "state.safetensors")
    kept = {name.removeprefix("parameter.") for name in state if name.startswith("parameter.")}
    assert kept == chosen
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    graft.finetune(dataclasses.replace(config, resume=True))
    again = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    assert all(torch.equal(again[name], after[name]) for name in after)
