"""What torchao quantises and Transformers saves, brought in and compared with its own weights."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import graft
from graft.convert.config import ConvertConfig

pytestmark = pytest.mark.filterwarnings("default")  # torchao tells of its kernels for GPUs
quantization = pytest.importorskip(
    "torchao.quantization", reason="needs torchao: make test-peers installs it"
)


def configurations():
    from torchao.prototype.mx_formats.inference_workflow import (
        MXDynamicActivationMXWeightConfig,
        NVFP4WeightOnlyConfig,
    )
    from torchao.quantization import granularity

    group, row = granularity.PerGroup(32), granularity.PerAxis(0)
    return {
        "int8": quantization.Int8WeightOnlyConfig(),
        "int8-groups": quantization.Int8WeightOnlyConfig(granularity=group),
        "int8-inputs": quantization.Int8DynamicActivationInt8WeightConfig(),
        "int4": quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=group),
        "int4-shifted": quantization.IntxWeightOnlyConfig(
            weight_dtype=torch.int4,
            granularity=group,
            mapping_type=quantization.MappingType.ASYMMETRIC,
        ),
        "int3": quantization.IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=group),
        "int2-rows": quantization.IntxWeightOnlyConfig(weight_dtype=torch.int2, granularity=row),
        "int6": quantization.IntxWeightOnlyConfig(weight_dtype=torch.int6, granularity=group),
        "fp8": quantization.Float8WeightOnlyConfig(),
        "mxfp8": MXDynamicActivationMXWeightConfig(),
        "nvfp4": NVFP4WeightOnlyConfig(),
    }


NAMES = (
    *("int8", "int8-groups", "int8-inputs", "int4", "int4-shifted", "int3", "int2-rows", "int6"),
    *("fp8", "mxfp8", "nvfp4"),
)


@pytest.mark.parametrize("name", NAMES)
def test_weights(name, tiny_base, tmp_path):
    from transformers import TorchAoConfig

    model = AutoModelForCausalLM.from_pretrained(
        tiny_base, dtype=torch.bfloat16, quantization_config=TorchAoConfig(configurations()[name])
    )
    theirs = {
        f"{layer}.weight": module.weight.dequantize(output_dtype=torch.float32)
        if "intx" not in type(module.weight).__name__.lower()
        else by_hand(module.weight)
        for layer, module in model.named_modules()
        if hasattr(getattr(module, "weight", None), "dequantize")
        and type(module.weight).__name__ != "Parameter"
    }
    assert len(theirs) == 14
    model.save_pretrained(tmp_path / "theirs")
    for file in tiny_base.glob("*token*"):
        (tmp_path / "theirs" / file.name).write_bytes(file.read_bytes())
    asked = ConvertConfig(dequantise=True)
    report = graft.convert_model(tmp_path / "theirs", tmp_path / "out", config=asked)
    assert sum(report.dense.values()) == 14 and not report.left_out
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for key, weight in theirs.items():
        torch.testing.assert_close(stored[key], weight, rtol=2e-7, atol=0)
    inputs = any("rounds the inputs" in note for note in report.notes)
    assert inputs == (name in ("int8-inputs", "mxfp8"))
    if name.startswith("int"):
        kept = graft.convert_model(tmp_path / "theirs", tmp_path / "kept")
        assert sum(kept.layers.values()) == 14
        codes = graft.load(tmp_path / "kept", dtype="float32")[0]
        for key, weight in theirs.items():
            layer = codes.get_submodule(key.removesuffix(".weight"))
            found = layer.dense_weight(torch.float32)
            step = weight.abs().max() / 2 ** int(name[3]) * 2
            assert (found - weight).abs().max() <= (kept.rounding + 1e-6) * step
        print(f"{name}: {kept.layers}, {kept.rounding:.1e} of a step")


def by_hand(weight):
    """Return the weight in float32, which its own `dequantize` rounds to the model's dtype."""
    size = weight.block_size[1]
    scale, zero = (
        part.float().repeat_interleave(size, 1) for part in (weight.scale, weight.zero_point)
    )
    return (weight.qdata.float() - zero) * scale
