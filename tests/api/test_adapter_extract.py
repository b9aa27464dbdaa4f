"""An adapter of a tuned model: what it gives back, what it leaves out, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.api.adapters_of_one_base import tuned

import graft
from graft.api.adapter.extract import CURVE_PICTURE, extract_adapter
from graft.api.adapter.files import ADAPTER_REPORT
from graft.api.adapter.listing import list_adapters
from graft.api.adopt import adopt
from graft.api.run.folder import load_any
from graft.errors import GraftError
from graft.model.adapter_files import load_adapter
from graft.model.targets import freeze_layers, linear_layers

IDS = torch.arange(40, 72)[None]


def logits(path: Path, adapter: Path | None = None) -> torch.Tensor:
    loaded = load_any(path, "float32", "cpu")
    if adapter is not None:
        freeze_layers(loaded.model, [*linear_layers(loaded.model)])
        load_adapter(loaded.model, adapter)
    with torch.no_grad():
        return loaded.model(input_ids=IDS, use_cache=False).logits


def test_all_ranks_give_the_tuned_logits_back(tiny_base: Path, tmp_path: Path) -> None:
    other = tuned(tiny_base, tmp_path / "tuned", lambda name: "proj" in name)
    report = extract_adapter(tiny_base, other, tmp_path / "whole", energy=1.0)
    assert report.relative_error < 1e-6 and not report.rest
    assert len(report.layers) == 14
    expected = logits(other)
    assert (expected - logits(tiny_base)).abs().max() > 1
    assert (expected - logits(tiny_base, tmp_path / "whole")).abs().max() < 1e-4
    cut = extract_adapter(tiny_base, other, tmp_path / "cut", rank=8)
    assert {layer.rank for layer in cut.layers.values()} == {8}
    assert 0.3 < cut.relative_error < 0.95


def test_the_sweep_says_what_each_rank_leaves_out(tiny_base: Path, tmp_path: Path) -> None:
    other = tuned(tiny_base, tmp_path / "tuned", lambda name: "q_proj" in name)
    extract_adapter(tiny_base, other, tmp_path / "adapter", energy=0.9)
    report = json.loads((tmp_path / "adapter" / ADAPTER_REPORT).read_text())
    picture = (tmp_path / "adapter" / CURVE_PICTURE).read_bytes()
    assert picture.startswith(b"\x89PNG")
    by_rank = [point for point in report["curve"] if point["rank"] is not None]
    assert [point["rank"] for point in by_rank] == [1, 2, 4, 8, 16, 32, 64]
    one, two = load_file(tiny_base / "model.safetensors"), load_file(other / "model.safetensors")
    names = [name for name in one if "q_proj" in name]
    for point in by_rank:
        values = [torch.linalg.svdvals((two[name] - one[name]).double()) for name in names]
        lost = sum(float(each[point["rank"] :].square().sum()) for each in values)
        total = sum(float(each.square().sum()) for each in values)
        assert point["relative_error"] == pytest.approx((lost / total) ** 0.5, abs=1e-6)
        assert point["parameters"] == 2 * point["rank"] * 128
    (chosen,) = (point for point in report["curve"] if point["energy"] == 0.9)
    assert report["relative_error"] == chosen["relative_error"] <= 0.1**0.5
    assert report["parameters"] == chosen["parameters"]


def test_what_is_in_no_linear_layer_is_named_and_kept(tiny_base: Path, tmp_path: Path) -> None:
    other = tuned(tiny_base, tmp_path / "tuned", lambda name: True)
    report = extract_adapter(tiny_base, other, tmp_path / "adapter", energy=1.0)
    norms = {
        f"model.layers.{n}.{part}_layernorm.weight"
        for n in range(2)
        for part in ("input", "post_attention")
    }
    assert set(report.rest) == {*norms, "model.norm.weight", "model.embed_tokens.weight"}
    assert report.rest["model.embed_tokens.weight"] == max(report.rest.values())
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    tied = {f"base_model.model.{name}.weight" for name in ("model.embed_tokens", "lm_head")}
    assert tied <= saved.keys()
    (listed,) = list_adapters([tmp_path / "adapter"])
    assert sum(listed.targets.values()) == 14 and "proj" in "".join(listed.targets)
    adopt(tmp_path / "adapter", tmp_path / "run", model=str(tiny_base))
    assert (logits(tmp_path / "run") - logits(other)).abs().max() < 1e-4
    dropped = extract_adapter(tiny_base, other, tmp_path / "dropped", energy=1.0, rest="drop")
    assert dropped.rest == report.rest and not dropped.rest_kept
    assert not any(
        "norm" in name for name in load_file(tmp_path / "dropped" / "adapter_model.safetensors")
    )


def test_a_run_of_any_method_becomes_a_lora(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    config = graft.TrainConfig(
        model=str(tiny_base),
        data=str(rows),
        out=str(tmp_path / "run"),
        steps=3,
        device="cpu",
        method="qalora",
        learning_rate=0.05,
    )
    graft.finetune(config)
    report = extract_adapter(tiny_base, tmp_path / "run", tmp_path / "adapter", energy=1.0)
    assert report.relative_error < 1e-6
    gap = (logits(tiny_base, tmp_path / "adapter") - logits(tmp_path / "run")).abs().max()
    assert gap < 1e-4
    of_update = extract_adapter(tmp_path / "run" / "base", tmp_path / "run", tmp_path / "b", rank=2)
    assert of_update.layers and of_update.relative_error < 1


def test_biases_of_layers_are_in_the_lora(tmp_path: Path, tiny_base: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "model.safetensors").unlink()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 320}
    Qwen2ForCausalLM(Qwen2Config(**sizes, **heads)).save_pretrained(base)
    other = tuned(
        base, tmp_path / "tuned", lambda name: name.endswith(("q_proj.bias", "o_proj.weight"))
    )
    report = extract_adapter(base, other, tmp_path / "adapter", energy=1.0)
    assert not report.rest and len(report.layers) == 1
    assert (logits(base, tmp_path / "adapter") - logits(other)).abs().max() < 1e-4
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["lora_bias"] and len(config["target_modules"]) == 2


def test_what_cannot_be_extracted_is_told(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(GraftError, match="there is nothing to extract"):
        extract_adapter(tiny_base, tiny_base, tmp_path / "out", rank=2)
    with pytest.raises(GraftError, match="give one of --rank"):
        extract_adapter(tiny_base, tiny_base, tmp_path / "out")
    with pytest.raises(GraftError, match="--energy is 1.5"):
        extract_adapter(tiny_base, tiny_base, tmp_path / "out", energy=1.5)
    norms = tuned(tiny_base, tmp_path / "norms", lambda name: name == "model.norm.weight")
    with pytest.raises(GraftError, match="in no linear layer, only in model.norm.weight"):
        extract_adapter(tiny_base, norms, tmp_path / "out", rank=2)
    wider = shutil.copytree(tiny_base, tmp_path / "wider")
    tensors = load_file(wider / "model.safetensors")
    for name in [name for name in tensors if "mlp" in name]:
        shape = [96 + 32 if size == 96 else size for size in tensors[name].shape]
        tensors[name] = torch.zeros(shape)
    save_file(tensors, wider / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((wider / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(GraftError, match=r"down_proj is \[96, 64\] in the base, \[128, 64\]"):
        extract_adapter(tiny_base, wider, tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()
