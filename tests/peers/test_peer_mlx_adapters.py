"""Adapters that mlx-lm makes and saves, adopted: the logits are mlx-lm's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.model.small_models import model_of
from torch import Tensor

import graft

mx = pytest.importorskip("mlx.core", reason="needs mlx: make test-peers installs it")
pytest.importorskip("mlx_lm", reason="needs mlx-lm: make test-peers installs it")

from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.tuner.utils import linear_to_lora_layers  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402

IDS = torch.randint(4, 90, (1, 24), generator=torch.Generator().manual_seed(5))
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "named layers": ({"keys": ["self_attn.q_proj", "mlp.down_proj"]}, False),
    "all layers": ({}, False),
    "the last block": ({"num_layers": 1}, False),
    "dora": ({"fine_tune_type": "dora", "keys": ["self_attn.q_proj"]}, False),
    "head and embeddings": ({"keys": ["self_attn.q_proj", "lm_head", "model.embed_tokens"]}, False),
    "embeddings that are the head": ({"keys": ["self_attn.q_proj", "model.embed_tokens"]}, True),
}


def ours(path: Path) -> Tensor:
    model, _ = graft.load(path, dtype="float32")
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS).logits[0].double()
    return out


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_mlx_lm_computes_the_same(case, tiny_base, tmp_path) -> None:
    options, tied = CASES[case]
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    made = model_of("llama", tie_word_embeddings=tied)
    made.save_pretrained(base)
    for file in tiny_base.glob("tokenizer*"):
        (base / file.name).write_bytes(file.read_bytes())
    model, _ = load_model(base)
    model.freeze()
    kind, layers = options.get("fine_tune_type", "lora"), options.get("num_layers", 2)
    update = {"rank": 4, "scale": 3.0, "dropout": 0.0}
    update |= {"keys": options["keys"]} if "keys" in options else {}
    linear_to_lora_layers(model, layers, update, use_dora=kind == "dora")
    mx.random.seed(3)
    parts = dict(tree_flatten(model.trainable_parameters()))
    moved = {name: part + 0.05 * mx.random.normal(part.shape) for name, part in parts.items()}
    model.load_weights(list(moved.items()), strict=False)
    adapter.mkdir()
    mx.save_safetensors(str(adapter / "adapters.safetensors"), moved)
    config = {"model": str(base), "fine_tune_type": kind, "num_layers": layers}
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_parameters": update}))
    expected = torch.tensor(model(mx.array(IDS.tolist()))[0].tolist(), dtype=torch.float64)
    graft.adopt(adapter, tmp_path / "run")
    found = ours(tmp_path / "run")
    scale = expected.abs().max()
    assert (found - expected).abs().max() / scale < 1e-4
    assert (ours(base) - expected).abs().max() / scale > 1e-2
