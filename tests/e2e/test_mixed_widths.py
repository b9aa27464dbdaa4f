"""A model whose layers have widths of their own: trained, merged, saved, exported."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import PreTrainedModel

import graft
from graft.adapters.attach import frozen_layers
from graft.errors import GraftError


def probe(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        ids = torch.arange(60, device=model.device).reshape(2, 30) + 5
        return model(input_ids=ids).logits.cpu()


@pytest.mark.parametrize(("method", "solver"), [("qalora", "gptq"), ("affine", "rtn")])
def test_from_training_to_a_gguf(tiny_base, rows, tmp_path, method, solver):
    run = tmp_path / "run"
    report = graft.finetune(
        graft.TrainConfig(
            model=str(tiny_base),
            data=str(rows),
            method=method,
            solver=solver,
            bits="auto",
            budget=4.1,
            max_length=48,
            steps=3,
            batch_size=4,
            learning_rate=1e-2,
            export=("gguf",),
            out=str(run),
        )
    )
    assert report.bits_per_weight is not None
    assert 3.8 < report.bits_per_weight <= 4.1
    assert "bits: auto" in (run / "config.yaml").read_text()
    described = json.loads((run / "base" / "graft.json").read_text())["layers"]
    assert len({layer["bits"] for layer in described.values()}) > 1
    trained, _ = graft.load(run)
    assert {name: layer.weight_format.bits for name, layer in frozen_layers(trained)} == {
        name: layer["bits"] for name, layer in described.items()
    }
    assert graft.merge(run, tmp_path / "merged").exact
    merged, _ = graft.load(tmp_path / "merged")
    exported, _ = graft.load(run / "export" / "model.gguf", tokenizer=str(tmp_path / "merged"))
    assert torch.equal(probe(trained), probe(merged))
    assert torch.equal(probe(trained), probe(exported))


def test_what_does_not_fit_together_is_told_first(tiny_base, tmp_path):
    common = {"model": str(tiny_base), "format": "int", "out": str(tmp_path / "out")}
    with pytest.raises(GraftError, match="--bits auto and --budget belong together"):
        graft.quantize(graft.QuantizeConfig(**common, bits="auto"))
    with pytest.raises(GraftError, match="--bits auto and --budget belong together"):
        graft.quantize(graft.QuantizeConfig(**common, bits=4, budget=4.0))
    with pytest.raises(GraftError, match="--bits auto needs --data"):
        graft.quantize(graft.QuantizeConfig(**common, bits="auto", budget=4.0))
    assert not (tmp_path / "out").exists()
