"""graft reads what auto-round writes, as auto-round's own layers read it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import graft
from graft.adapters.attach import frozen_layers
from graft.convert.config import ConvertConfig

auto_round = pytest.importorskip(
    "auto_round", reason="needs auto-round: make test-peers installs it"
)

pytestmark = pytest.mark.filterwarnings("default")  # auto-round counts on a GPU

MIXED = {"model.layers.0.self_attn.q_proj": {"bits": 8}, "model.layers.1.mlp.up_proj": {"bits": 2}}
CASES = [
    ("auto_round", 4, True, {}),
    ("auto_round", 3, False, {}),
    ("auto_round", 4, False, {"layer_config": MIXED}),
    ("auto_round:auto_gptq", 4, False, {}),
    ("auto_round:auto_awq", 4, False, {}),
    ("auto_gptq", 2, False, {}),
    ("auto_awq", 4, True, {}),
]
TOKENS = torch.arange(60).reshape(2, 30) + 5


def written(base: Path, folder: Path, packing: str, **scheme: Any) -> Path:
    """Return the folder that auto-round writes for the model, rounded to nearest."""
    tool = auto_round.AutoRound(
        str(base), iters=0, disable_opt_rtn=True, enable_torch_compile=False, **scheme
    )
    tool.quantize_and_save(str(folder), format=packing)
    return next(path.parent for path in folder.rglob("config.json"))


def reader(settings: dict[str, Any]) -> Callable[[dict[str, Tensor], str], Tensor]:
    """Return how auto-round reads a layer of a folder, float32 [out_features, in_features]."""
    packing = settings.get("packing_format", settings["quant_method"])
    group_size = settings["group_size"]

    def of_awq(tensors: dict[str, Tensor], name: str) -> Tensor:
        from auto_round.export.export_to_awq.utils import dequantize_gemm

        parts = [tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")]
        weight: Tensor = dequantize_gemm(*parts[:2], parts[2].float(), 4, group_size)
        return weight.T

    def of_gptq(tensors: dict[str, Tensor], name: str) -> Tensor:
        if "gptq" in packing:
            from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
        else:
            from auto_round_extension.torch.qlinear_torch import QuantLinear
        qweight, scales = tensors[f"{name}.qweight"], tensors[f"{name}.scales"]
        bits = tensors[f"{name}.qzeros"].shape[1] * 32 // qweight.shape[1]
        inputs = qweight.shape[0] * 32 // bits
        layer = QuantLinear(bits, group_size, inputs, qweight.shape[1], bias=False)
        layer.qweight, layer.qzeros = qweight, tensors[f"{name}.qzeros"]
        layer.scales = scales.float()
        out: Tensor = layer(torch.eye(inputs))
        return out.T

    return of_awq if "awq" in packing else of_gptq


@pytest.mark.parametrize(("packing", "bits", "symmetric", "more"), CASES)
def test_weights_and_logits(packing, bits, symmetric, more, tiny_base, tmp_path):
    scheme = {"bits": bits, "group_size": 32, "sym": symmetric} | more
    folder = written(tiny_base, tmp_path / "theirs", packing, **scheme)
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    report = graft.convert_model(folder, tmp_path / "out")
    dense = ConvertConfig(dequantise=True)
    graft.convert_model(folder, tmp_path / "dense", config=dense)
    tensors, read = load_file(folder / "model.safetensors"), reader(settings)
    floats = load_file(tmp_path / "dense" / "model.safetensors")
    model, _ = graft.load(tmp_path / "out", dtype="float32")
    reference = LlamaForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    layers = list(frozen_layers(model))
    assert layers
    for name, layer in layers:
        weight = read(tensors, name)
        assert torch.equal(floats[f"{name}.weight"], weight), name
        step = layer.packed["scales"].double().repeat_interleave(layer.weight_format.group_size, -1)
        moved = (layer.dense_weight(torch.float32).double() - weight).abs()
        assert (moved / step[:, : moved.shape[1]]).max() <= report.rounding + 1e-5
        reference.get_parameter(f"{name}.weight").data = weight
    with torch.no_grad():
        ours, theirs = model(TOKENS).logits, reference(TOKENS).logits
    assert (ours - theirs).abs().max() <= (1e-5 + report.rounding) * theirs.abs().max()


@pytest.mark.parametrize("scheme", ["MXFP4", "NVFP4", "MXFP8"])
def test_floats_of_few_bits(scheme, tiny_base, tmp_path):
    """They come in dequantised; the inputs, which auto-round rounds too, are left as they are."""
    rows = [torch.randint(5, 90, (1, 32)) for _ in range(4)]  # NVFP4 looks at inputs
    options = {"scheme": scheme, "dataset": rows, "nsamples": 4, "seqlen": 32, "batch_size": 1}
    folder = written(tiny_base, tmp_path / "theirs", "auto_round", **options)
    dense = ConvertConfig(dequantise=True)
    report = graft.convert_model(folder, tmp_path / "dense", config=dense)
    assert sum(report.dense.values()) == 14
    assert any("rounds the inputs of quantised layers too" in note for note in report.notes)
    floats = load_file(tmp_path / "dense" / "model.safetensors")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = {
        name: module
        for name, module in theirs.named_modules()
        if hasattr(module, "dequant_weight_online")
    }
    assert len(layers) == 14
    for name, layer in layers.items():
        layer.dtype = torch.float32
        weight = layer.dequant_weight_online()
        torch.testing.assert_close(floats[f"{name}.weight"], weight, rtol=1e-6, atol=0)
