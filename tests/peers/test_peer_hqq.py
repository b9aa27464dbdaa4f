"""What hqq quantises and saves, brought in and compared with what it dequantises."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import graft
from graft.convert.config import ConvertConfig

pytestmark = pytest.mark.filterwarnings("default")  # hqq counts on a GPU
pytest.importorskip("hqq", reason="needs hqq: make test-peers installs it")


def quantised(base, options, compute_dtype=torch.float32):
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    model = AutoModelForCausalLM.from_pretrained(base, dtype=compute_dtype)
    settings = BaseQuantizeConfig(**options)
    AutoHQQHFModel.quantize_model(model, settings, compute_dtype=compute_dtype, device="cpu")
    weights = {
        name: module.dequantize()
        for name, module in model.named_modules()
        if hasattr(module, "W_q")
    }
    assert len(weights) == 14
    return model, weights


def save(model, folder, form):
    from hqq.models.hf.base import AutoHQQHFModel

    if form == "pickled":
        AutoHQQHFModel.save_quantized(model, str(folder))
        return
    folder.mkdir()
    model.config.to_json_file(folder / "config.json", use_diff=False)
    settings = json.loads((folder / "config.json").read_text())
    if form == "transformers":
        settings["quantization_config"] = {"quant_method": "hqq", "skip_modules": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(settings))
    tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
    tensors.pop("lm_head.weight", None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


OPTIONS = {
    "4": {"nbits": 4, "group_size": 32, "axis": 1},
    "4-rows": {"nbits": 4, "group_size": None, "axis": 1},
    "8": {"nbits": 8, "group_size": 32, "axis": 1},
    "3": {"nbits": 3, "group_size": 32, "axis": 1},
    "2-float": {"nbits": 2, "group_size": 16, "axis": 1, "view_as_float": True},
    "1": {"nbits": 1, "group_size": 32, "axis": 1},
    "5": {"nbits": 5, "group_size": 64, "axis": 1},
    "1.58": {"nbits": 1.58, "group_size": 32, "axis": 1},
    "4-scattered": {"nbits": 4, "group_size": 64, "axis": 0},
    "3-scattered": {"nbits": 3, "group_size": 64, "axis": 0},
}


CASES = [(name, "pickled") for name in OPTIONS] + [("4", "plain"), ("3", "transformers")]


@pytest.mark.parametrize(("name", "form"), CASES)
def test_weights(name, form, tiny_base, tmp_path):
    folder = tmp_path / "theirs"
    model, weights = quantised(tiny_base, OPTIONS[name])
    save(model, folder, form)
    for file in tiny_base.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    asked = ConvertConfig(dequantise=True)
    report = graft.convert_model(folder, tmp_path / "out", config=asked)
    assert sum(report.dense.values()) == 14 and not report.left_out
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for layer, weight in weights.items():
        # Scale times code minus scale times zero, where hqq subtracts first.
        torch.testing.assert_close(stored[f"{layer}.weight"], weight, rtol=2e-7, atol=2e-7)
    if "scattered" in name or name == "5":
        return
    kept = graft.convert_model(folder, tmp_path / "kept")
    assert sum(kept.layers.values()) == 14
    codes = graft.load(tmp_path / "kept", dtype="float32")[0]
    largest = 0.0
    for layer, weight in weights.items():
        found = codes.get_submodule(layer)
        step = (
            found.packed["scales"]
            .double()
            .repeat_interleave(found.weight_format.group_size, 1)[:, : found.in_features]
        )
        error = (found.dense_weight(torch.float32).double() - weight.double()).abs() / step
        largest = max(largest, float(error.max()))
    print(f"{name}: {largest:.1e} of a step, {kept.rounding:.1e} told, {kept.layers}")
    assert largest <= kept.rounding + 1e-4


def test_nested_statistics_of_older_releases(tiny_base, tmp_path):
    """hqq no longer writes them: its quantiser makes them here, and its reader reads them."""
    from hqq.core.quantize import HQQLinear, Quantizer

    model, _ = quantised(tiny_base, OPTIONS["4"])
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, HQQLinear):
            meta = module.meta
            for part, options in (
                ("zero", {"nbits": 8, "channel_wise": False, "group_size": None}),
                ("scale", {"nbits": 8, "channel_wise": True, "group_size": 32, "axis": 0}),
            ):
                given = {"optimize": False, "device": "cpu"} | options
                codes, inner = Quantizer.quantize(meta.pop(part), **given)
                meta |= {
                    f"{part}_q": codes,
                    f"meta_{part}": inner | {"compute_dtype": torch.float32},
                }
                meta[f"quant_{part}"] = True
            weights[name] = module.dequantize()
    save(model, tmp_path / "theirs", "pickled")
    for file in tiny_base.glob("*token*"):
        (tmp_path / "theirs" / file.name).write_bytes(file.read_bytes())
    asked = ConvertConfig(dequantise=True)
    graft.convert_model(tmp_path / "theirs" / "qmodel.pt", tmp_path / "out", config=asked)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for layer, weight in weights.items():
        torch.testing.assert_close(stored[f"{layer}.weight"], weight, rtol=2e-7, atol=2e-7)
