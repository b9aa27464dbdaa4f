"""graft convert on the command line: what is printed, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from graft.cli.main import main

EXTRA = "model.layers.0.self_attn.rotary_emb.inv_freq"
"""Older checkpoints hold it; the model computes it."""


@pytest.fixture
def pickled(tiny_base: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "theirs"
    shutil.copytree(tiny_base, folder)
    tensors = load_file(folder / "model.safetensors") | {EXTRA: torch.ones(12)}
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def test_a_gguf(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, file, out = tmp_path / "base", tmp_path / "m.gguf", tmp_path / "out"
    assert main(["quantize", "--model", str(tiny_base), "--format", "int", "--out", str(base)]) == 0
    assert main(["export", str(base), "--to", "gguf", "--out", str(file)]) == 0
    capsys.readouterr()
    assert main(["convert", str(file), "--out", str(tmp_path / "alone")]) == 0
    assert "the tokenizer is made of what the file says of it" in capsys.readouterr().out
    assert main(["convert", str(file), "--out", str(out), "--tokenizer", str(base)]) == 0
    told = capsys.readouterr().out
    assert "GGUF" in told and "14 of int, 4 bits, groups of 32 (5.00 bits per weight)" in told
    assert "with those that were read from the source: equal" in told and str(out) in told
    assert main(["convert", str(file), "--out", str(out), "--tokenizer", str(base)]) == 1
    assert "exists already" in capsys.readouterr().err


def test_pickled_weights(pickled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(pickled), "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kind"] == "PyTorch, pickled"
    assert report["left_out"] == [EXTRA]
    assert report["path"] == str(out)
    assert main(["convert", str(pickled), "--out", str(tmp_path / "again")]) == 0
    told = capsys.readouterr().out
    assert "none is quantised" in told and "left out" in told
