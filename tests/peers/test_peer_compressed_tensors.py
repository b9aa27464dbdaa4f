"""What compressed-tensors compresses itself, brought in and compared with what it decompresses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import graft
from graft.adapters.attach import frozen_layers
from graft.convert.config import ConvertConfig

pytest.importorskip("compressed_tensors", reason="needs compressed-tensors: make test-peers")

pytestmark = pytest.mark.filterwarnings("default")  # Transformers tells of the setting below
IDS = torch.arange(60).reshape(2, 30) + 5
EXACT = ("W4A16_ASYM", "W4A16", "W8A8", "W8A16", "W2A16", "W3A16", "W5A16", "W6A16", "W7A16")
FLOATS = (
    "FP8",
    "FP8_DYNAMIC",
    "FP8_BLOCK",
    "NVFP4A16",
    "NVFP4",
    "MXFP4A16",
    "MXFP6A16",
    "MXFP8A16",
)


def statistics(weight: Tensor, scheme) -> dict[str, Tensor]:
    """Return scales and zero points from minimum and maximum, as the tool computes them."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args, (rows, columns) = scheme.weights, weight.shape
    strategy = str(args.strategy)
    if "group" in strategy:
        parts = weight.unflatten(1, (-1, args.group_size))
        low, high = parts.amin(-1), parts.amax(-1)
    elif strategy == "channel":
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    elif strategy == "block":
        height, width = args.block_structure
        blocks = torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
        parts = blocks.unflatten(1, (-1, width)).unflatten(0, (-1, height))
        low, high = parts.amin((1, 3)), parts.amax((1, 3))
    else:
        low, high = weight.min().reshape(1), weight.max().reshape(1)
    found = {"weight": weight}
    overall = None
    if strategy == "tensor_group":
        overall = generate_gparam(weight.min(), weight.max())
        found["weight_global_scale"] = overall.reshape(1)
    scales, zeros = calculate_qparams(low, high, args, overall)
    found["weight_scale"] = scales
    if not args.symmetric:
        found["weight_zero_point"] = zeros
    return found


def compressed(base: Path, folder: Path, name: str, dtype: torch.dtype, groups: int = 0) -> None:
    """Write the base compressed as a preset of the tool says."""
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = preset_name_to_scheme(name, ["Linear"])
    if scheme.weights.type == "int":
        scheme.weights.group_size = groups or None
        scheme.weights.strategy = "group" if groups else "channel"
    if scheme.weights.block_structure:
        scheme.weights.block_structure = [48, 40]
    write(base, folder, scheme, infer_module_format(torch.nn.Linear, scheme).value, dtype)


def write(base: Path, folder: Path, scheme, form: str, dtype: torch.dtype) -> None:
    """Write the base in that form."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    scheme.format = form
    compressor = BaseCompressor.get_value_from_registry(form)
    tensors = load_file(base / "model.safetensors")
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        layer = key.removesuffix(".weight")
        parts = statistics(tensors.pop(key).to(dtype), scheme)
        for part, tensor in compressor.compress(parts, scheme).items():
            tensors[f"{layer}.{part}"] = tensor.contiguous()
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=form,
        quantization_status="compressed",
        ignore=["lm_head"],
    )
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((base / "config.json").read_text())
    settings["quantization_config"] = json.loads(config.model_dump_json())
    (folder / "config.json").write_text(json.dumps(settings))
    for file in base.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())


@pytest.fixture
def theirs(tmp_path):
    """Return the weights and the logits of the folder as Transformers reads it, decompressed."""

    def read() -> tuple[dict[str, Tensor], Tensor]:
        from transformers import CompressedTensorsConfig

        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "theirs",
            dtype=torch.float32,
            quantization_config=CompressedTensorsConfig(dequantize=True),
        ).eval()
        with torch.no_grad():
            return model.state_dict(), model(input_ids=IDS).logits

    return read


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("groups", [0, 16])
@pytest.mark.parametrize("preset", EXACT)
def test_integers(preset, groups, dtype, tiny_base, tmp_path, theirs):
    compressed(tiny_base, tmp_path / "theirs", preset, dtype, groups)
    report = graft.convert_model(tmp_path / "theirs", tmp_path / "out")
    assert sum(report.layers.values()) == 14
    weights, logits = theirs()
    model = graft.load(tmp_path / "out", dtype="float32")[0]
    largest = 0.0
    for name, layer in frozen_layers(model):
        scale = load_file(tmp_path / "theirs" / "model.safetensors")[f"{name}.weight_scale"].float()
        step = scale.repeat_interleave(layer.in_features // scale.shape[-1], -1)
        error = (layer.dense_weight(torch.float32) - weights[f"{name}.weight"]).abs() / step
        largest = max(largest, float(error.max()))
    levels = 2 ** int(preset[1])
    kept = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-23}[dtype]
    print(f"{preset} {dtype}: {largest:.1e} of a step, {report.rounding:.1e} by the rounding")
    # The tool rounds each weight to the dtype of its scales.
    assert largest <= report.rounding + levels * kept
    with torch.no_grad():
        ours = model(input_ids=IDS).logits
    assert (ours - logits).abs().max() <= 2e-2 * logits.abs().max()


@pytest.mark.parametrize("preset", EXACT + FLOATS)
def test_dequantised(preset, tiny_base, tmp_path, theirs):
    compressed(tiny_base, tmp_path / "theirs", preset, torch.float32, 32)
    asked = ConvertConfig(dequantise=True)
    report = graft.convert_model(tmp_path / "theirs", tmp_path / "out", config=asked)
    assert sum(report.dense.values()) == 14 and not report.left_out
    weights, logits = theirs()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    # Small floats are decompressed in bfloat16, which holds MX's to the letter.
    kept = 2.0**-8 if preset.startswith("NVFP4") else 2.0**-22
    for name, weight in weights.items():
        if name in stored:
            torch.testing.assert_close(stored[name], weight, rtol=kept, atol=0)
    with torch.no_grad():
        ours = graft.load(tmp_path / "out", dtype="float32")[0](input_ids=IDS).logits
    difference = float((ours - logits).abs().max() / logits.abs().max())
    print(f"{preset}: {difference:.1e} of the largest logit")
    assert difference <= (2e-2 if preset.startswith("NVFP4") else 1e-5)
    inputs = any("rounds the inputs" in note for note in report.notes)
    assert inputs == (not preset.endswith("A16") and "ASYM" not in preset)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group", "block"])
@pytest.mark.parametrize("form", ["int-quantized", "pack-quantized"])
def test_every_strategy(form, strategy, symmetric, bits, tiny_base, tmp_path, theirs):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    sizes = {"group": {"group_size": 16}, "block": {"block_structure": [16, 32]}}
    args = QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy=strategy, **sizes.get(strategy, {})
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    write(tiny_base, tmp_path / "theirs", scheme, form, torch.float32)
    asked = ConvertConfig(dequantise=True)
    graft.convert_model(tmp_path / "theirs", tmp_path / "out", config=asked)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in theirs()[0].items():
        if name in stored:
            torch.testing.assert_close(stored[name], weight, rtol=0, atol=1e-7)
