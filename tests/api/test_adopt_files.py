"""Adapters of mlx-lm and pickled ones come in as PEFT's do; others are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.api.foreign_adapters import (
    PREFIX,
    WEIGHTS,
    dense,
    distance,
    logits,
    low_rank,
    merged,
    save_peft,
)

import graft
from graft.errors import GraftError

SAME = 1e-5


def save_mlx(folder: Path, tensors: dict[str, torch.Tensor], base: Path, **options: Any) -> Path:
    """Write what mlx_lm.lora writes: factors the other way round, and a scale as it is."""
    folder.mkdir()
    config = {
        "model": str(base),
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": 4, "scale": 3.0, "dropout": 0.0}
        | {"keys": ["self_attn.q_proj", "self_attn.v_proj"]},
        "learning_rate": 1e-5,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | options))
    names = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b"}
    found = {}
    for key, tensor in tensors.items():
        for part, name in names.items():
            if key.endswith(part):
                module = key.removeprefix(PREFIX).removesuffix(part)
                found[module + name] = tensor.T.contiguous()
    save_file(found, folder / "adapters.safetensors")
    return folder


def test_an_adapter_of_mlx_lm(tiny_base, tmp_path) -> None:
    tensors = low_rank(dense(tiny_base))
    report = graft.adopt(save_mlx(tmp_path / "a", tensors, tiny_base), tmp_path / "run")
    assert report.layers == 4 and "mlx-lm" in (tmp_path / "run" / "report.md").read_text()
    found = logits(graft.load(tmp_path / "run")[0])
    assert distance(found, merged(dense(tiny_base), tensors, 3.0)) < SAME
    graft.export_model(tmp_path / "run", "hf", tmp_path / "hf")
    assert "mlx-lm; graft brought the adapter in" in (tmp_path / "hf" / "README.md").read_text()


def test_the_last_layers_of_mlx_lm(tiny_base, tmp_path) -> None:
    whole = low_rank(dense(tiny_base))
    tensors = {key: tensor for key, tensor in whole.items() if "layers.1." in key}
    adapter = save_mlx(tmp_path / "a", tensors, tiny_base, num_layers=1)
    assert graft.adopt(adapter, tmp_path / "run").layers == 2
    adapter = save_mlx(tmp_path / "b", tensors, tiny_base, num_layers=-1)
    with pytest.raises(GraftError, match="no tensors for 2 of the 4 layers"):
        graft.adopt(adapter, tmp_path / "again")


def test_the_layers_of_mlx_lm_without_keys_are_all(tiny_base, tmp_path) -> None:
    model = dense(tiny_base)
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    update = {"rank": 4, "scale": 3.0, "dropout": 0.0}
    tensors = low_rank(model, kinds)
    adapter = save_mlx(tmp_path / "a", tensors, tiny_base, lora_parameters=update)
    graft.adopt(adapter, tmp_path / "run")
    found = logits(graft.load(tmp_path / "run")[0])
    assert distance(found, merged(dense(tiny_base), tensors, 3.0)) < SAME
    adapter = save_mlx(tmp_path / "b", low_rank(model), tiny_base, lora_parameters=update)
    with pytest.raises(GraftError, match="no tensors for 10 of the 14 layers"):
        graft.adopt(adapter, tmp_path / "again")


def test_mlx_lms_dora_scales_rows_to_their_magnitudes(tiny_base, tmp_path) -> None:
    model = dense(tiny_base)
    tensors = low_rank(model, ("q_proj",))
    update = {"rank": 4, "scale": 3.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    adapter = save_mlx(
        tmp_path / "a", tensors, tiny_base, fine_tune_type="dora", lora_parameters=update
    )
    merged(model, tensors, 3.0)
    found = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith("q_proj"):
                magnitude = torch.rand(len(module.weight)) + 0.5
                module.weight *= (magnitude / module.weight.norm(dim=1))[:, None]
                found[f"{name}.m"] = magnitude
                for part in "ab":
                    key = f"{PREFIX}{name}.lora_{part.upper()}.weight"
                    found[f"{name}.lora_{part}"] = tensors[key].T.contiguous()
    save_file(found, adapter / "adapters.safetensors")
    graft.adopt(adapter, tmp_path / "run")
    assert distance(logits(graft.load(tmp_path / "run")[0]), logits(model)) < SAME


MLX_REFUSED: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor] | None, str]] = {
    "whole weights": ({"fine_tune_type": "full"}, None, "fine_tune_type 'full': whole weights"),
    "another kind": ({"fine_tune_type": "ia3"}, None, "expected 'lora' or 'dora'"),
    "no scale": ({"lora_parameters": {"rank": 4, "alpha": 16}}, None, "scale"),
    "experts": (
        {},
        {"model.layers.0.mlp.switch_mlp.up_proj.lora_a": torch.ones(2, 4, 8)},
        "fused experts",
    ),
    "whole tensors": ({}, {"model.norm.weight": torch.ones(64)}, "no tensor of an adapter"),
}


@pytest.mark.parametrize("case", MLX_REFUSED)
def test_what_of_mlx_lm_is_refused_by_name(case, tiny_base, tmp_path) -> None:
    options, tensors, piece = MLX_REFUSED[case]
    adapter = save_mlx(tmp_path / "a", low_rank(dense(tiny_base)), tiny_base, **options)
    if tensors is not None:
        save_file(tensors, adapter / "adapters.safetensors")
    with pytest.raises(GraftError, match=piece):
        graft.adopt(adapter, tmp_path / "run")


def test_a_pickled_adapter_of_early_peft(tiny_base, tmp_path) -> None:
    tensors = low_rank(dense(tiny_base))
    adapter = save_peft(tmp_path / "a", tensors, tiny_base, enable_lora=None, merge_weights=False)
    (adapter / WEIGHTS).unlink()
    torch.save(
        {key: tensor.half() for key, tensor in tensors.items()}, adapter / "adapter_model.bin"
    )
    report = graft.adopt(adapter, tmp_path / "run")
    assert len(report.adapter_sha256) == 64
    halves = {key: tensor.half().float() for key, tensor in tensors.items()}
    found = logits(graft.load(tmp_path / "run")[0])
    assert distance(found, merged(dense(tiny_base), halves)) < SAME


def test_a_pickle_beside_safetensors_and_an_untrained_adapter_are_told(tiny_base, tmp_path) -> None:
    tensors = low_rank(dense(tiny_base))
    adapter = save_peft(tmp_path / "a", tensors, tiny_base)
    torch.save({key: 2 * tensor for key, tensor in tensors.items()}, adapter / "adapter_model.bin")
    told = graft.adopt(adapter, tmp_path / "run").lines()
    assert f"note: read is {WEIGHTS}; adapter_model.bin beside it is not" in told
    found = logits(graft.load(tmp_path / "run")[0])
    assert distance(found, merged(dense(tiny_base), tensors)) < SAME
    untrained = {key: tensor * ("lora_A" in key) for key, tensor in tensors.items()}
    told = graft.adopt(save_peft(tmp_path / "b", untrained, tiny_base), tmp_path / "b-run").lines()
    assert any("every lora_B is zero" in line for line in told)


class Program:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this ran",))


def test_a_pickle_that_holds_a_program_is_refused(tiny_base, tmp_path, capsys) -> None:
    adapter = save_peft(tmp_path / "a", low_rank(dense(tiny_base)), tiny_base)
    (adapter / WEIGHTS).unlink()
    torch.save({"a": Program()}, adapter / "adapter_model.bin")
    with pytest.raises(GraftError, match="could run code"):
        graft.adopt(adapter, tmp_path / "run")
    assert "this ran" not in capsys.readouterr().out


def test_other_programs_files_are_named(tiny_base, tmp_path) -> None:
    for name, whose in {
        "pytorch_lora_weights.safetensors": "diffusers",
        "adapters.npz": "mlx-lm",
        "adapter.pt": "torchtune",
    }.items():
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir(exist_ok=True)
        (folder / name).touch()
        with pytest.raises(GraftError, match=whose):
            graft.adopt(folder, tmp_path / "run")
    (tmp_path / "lora.gguf").touch()
    with pytest.raises(GraftError, match="the PEFT folder that it was made of can be adopted"):
        graft.adopt(tmp_path / "lora.gguf", tmp_path / "run")
    save_peft(tmp_path / "runs" / "checkpoint-8", low_rank(dense(tiny_base)), tiny_base)
    with pytest.raises(GraftError, match="there is one in 'checkpoint-8'"):
        graft.adopt(tmp_path / "runs", tmp_path / "run")
