"""Whole runs of each architecture: trained on integers, exported, and the same in llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from transformers import PreTrainedModel

import graft
import graft.api.verify as verifying
from graft.adapters.attach import frozen_layers
from graft.model.load import load_model

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: make test-peers installs it")


@pytest.mark.parametrize("name", ["gpt2", "falcon-40b", "phi", "phi3"])
def test_a_run_is_the_same_model_in_llama_cpp(
    name: str,
    tiny_model: Callable[..., PreTrainedModel],
    tiny_base: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verifying, "NEW_TOKENS", 8)
    base, run, file = tmp_path / "base", tmp_path / "run", tmp_path / "model.gguf"
    tokenizer = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    tiny_model(name, vocab_size=320, initializer_range=0.1, **tokenizer).save_pretrained(base)
    for part in tiny_base.glob("*token*"):
        (base / part.name).write_bytes(part.read_bytes())
    graft.finetune(
        graft.TrainConfig(
            model=str(base),
            data=str(rows),
            eval_fraction=0.25,
            method="qalora",
            steps=8,
            batch_size=4,
            learning_rate=0.02,
            dtype="float32",
            out=str(run),
        )
    )
    merged = graft.merge(run, tmp_path / "merged")
    assert merged.exact
    graft.export_model(run, "gguf", file)
    found = graft.verify(run, file)
    assert found.passed, found.problems
    assert found.fidelity.mean_kl <= 1e-3

    types = [tensor.tensor_type for tensor in gguf.GGUFReader(file).tensors]
    trained = load_model(str(tmp_path / "merged")).model
    assert types.count(gguf.GGMLQuantizationType.Q4_1) == len(list(frozen_layers(trained)))
