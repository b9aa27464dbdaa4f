"""The folder for MLX, read back by a reader of its bits; mlx itself is among the peers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, PhiConfig

from graft.adapters.attach import attach_adapter, frozen_layers
from graft.adapters.config import AdapterConfig
from graft.errors import GraftError
from graft.export.mlx.write import check_mlx, check_mlx_plan, export_mlx
from graft.formats.codebook import CodebookFormat
from graft.formats.dense import DenseFormat
from graft.formats.int_group import IntGroupFormat
from graft.model.load import LoadedModel

CASES = [(2, 32, 172), (3, 32, 192), (3, 64, 128), (4, 32, 172), (4, 128, 256), (8, 32, 172)]


def codes_of(words: torch.Tensor, bits: int) -> torch.Tensor:
    """A row's codes from one long integer of all its bits."""
    rows = []
    for row in words.contiguous().view(torch.uint8).numpy():
        stream = int.from_bytes(row.tobytes(), "little")
        count = row.size * 8 // bits
        rows.append([stream >> bits * i & (1 << bits) - 1 for i in range(count)])
    return torch.tensor(rows)


def loaded_model(model, tokenizer, dtype=torch.float32):
    return LoadedModel(model, tokenizer, None, dtype, torch.float32)


@pytest.mark.parametrize("bits, group_size, width", CASES)
def test_the_weights_are_the_same(bits, group_size, width, make_llama, tokenizer, tmp_path):
    model = make_llama(IntGroupFormat(bits, group_size), intermediate_size=width, mlp_bias=True)
    report = export_mlx(loaded_model(model, tokenizer), tmp_path / "m", dtype=torch.float32)
    found = load_file(tmp_path / "m" / "model.safetensors")
    whole = 0
    for name, layer in frozen_layers(model):
        weight = found.pop(f"{name}.weight")
        expected = layer.dense_weight(torch.float32)
        if layer.in_features % group_size:
            assert name in report.float32_layers
        else:
            whole += 1
            codes = codes_of(weight, bits).unflatten(-1, (-1, group_size))
            scales, offsets = (found.pop(f"{name}.{part}").float() for part in ("scales", "biases"))
            weight = (codes * scales[..., None] + offsets[..., None]).flatten(1)
        assert torch.equal(weight, expected), name
    assert whole == len(list(frozen_layers(model))) - len(report.float32_layers) > 0
    for name, tensor in found.items():
        assert torch.equal(tensor, model.get_parameter(name)), name
    settings = json.loads((tmp_path / "m" / "config.json").read_text())
    kind = {"group_size": group_size, "bits": bits, "mode": "affine"}
    assert settings["quantization"] == settings["quantization_config"] == kind
    assert settings["rope_theta"] == 10000.0 and settings["rope_scaling"] is None


def test_layers_of_other_widths_are_named(make_llama, tokenizer, tmp_path):
    model = make_llama(IntGroupFormat(4, 32))
    name, layer = next(iter(frozen_layers(model)))
    narrow = IntGroupFormat(2, 32)
    packed = narrow.pack(layer.dense_weight(torch.float32))
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer.replaced(narrow, packed))
    export_mlx(loaded_model(model, tokenizer), tmp_path / "m", dtype=torch.float32)
    settings = json.loads((tmp_path / "m" / "config.json").read_text())["quantization"]
    assert settings == {
        "group_size": 32,
        "bits": 4,
        "mode": "affine",
        name: {"group_size": 32, "bits": 2},
    }


def test_a_dense_model_is_written_in_its_dtype(make_llama, tokenizer, tmp_path):
    model = make_llama(rope_parameters={"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0})
    export_mlx(loaded_model(model, tokenizer, torch.bfloat16), tmp_path / "m", dtype=torch.bfloat16)
    found = load_file(tmp_path / "m" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    settings = json.loads((tmp_path / "m" / "config.json").read_text())
    assert "quantization" not in settings and settings["dtype"] == "bfloat16"
    assert settings["rope_theta"] == 5e4 and settings["rope_scaling"]["factor"] == 2.0


def test_what_mlx_cannot_hold_is_refused_before_anything_is_written(
    make_llama, tokenizer, tmp_path
):
    model = make_llama(IntGroupFormat(4, 16))
    name, _ = next(iter(frozen_layers(model)))
    attach_adapter(model, [name], AdapterConfig(method="qalora"))
    with pytest.raises(GraftError) as error:
        export_mlx(loaded_model(model, tokenizer), tmp_path / "m", dtype=torch.float32)
    assert "merge first" in str(error.value)
    assert list(tmp_path.iterdir()) == []
    problems = check_mlx(make_llama(IntGroupFormat(4, 16)))
    assert problems and all("group_size is 16" in problem for problem in problems)
    assert "nf4" in check_mlx(make_llama(CodebookFormat("nf4")))[0]
    config = make_llama().config
    assert check_mlx_plan(config, DenseFormat()) == []
    assert "gpt2" in check_mlx_plan(GPT2Config(), DenseFormat())[0]
    assert "qk_layernorm is True" in check_mlx_plan(PhiConfig(qk_layernorm=True), DenseFormat())[0]
    config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    assert "yarn" in check_mlx_plan(config, IntGroupFormat(4, 32))[0]


def test_weights_that_are_not_finite_are_refused(make_llama, tokenizer, tmp_path):
    model = make_llama(IntGroupFormat(4, 32))
    _, layer = next(iter(frozen_layers(model)))
    layer.packed["offsets"][0, 0] = torch.nan
    with pytest.raises(GraftError, match="not finite"):
        export_mlx(loaded_model(model, tokenizer), tmp_path / "m", dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []
