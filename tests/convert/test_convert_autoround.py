from __future__ import annotations

import functools

import pytest
import torch
from foreign import (
    awq_layer,
    awq_weight,
    change_tensors,
    foreign_folder,
    gptq_layer,
    gptq_weight,
    linear_names,
)
from safetensors.torch import load_file

import graft
from graft.adapters.attach import frozen_layers
from graft.errors import GraftError
from graft.formats.int_group import IntGroupFormat

LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def make(tiny_base, tmp_path):
    def write(layer, method="auto-round", **settings):
        named = {"quant_method": method, "bits": 4, "group_size": 32, "data_type": "int"}
        return foreign_folder(tiny_base, tmp_path / "theirs", named | settings, layer)

    return write


@pytest.mark.parametrize(
    ("method", "packing", "minus_one"),
    [
        ("auto-round", "auto_round:auto_gptq", True),
        ("auto-round", None, True),
        ("auto-round", "auto_round", False),
        ("auto-round", "auto_round:gptqmodel", False),
        ("intel/auto-round", "auto_round:gptq:exllamav2", True),
        ("intel/auto-round", "auto_round:exllamav2", False),
    ],
)
def test_layers_of_gptq(method, packing, minus_one, make, assert_converted):
    folder = make(gptq_layer(4, 32, minus_one=minus_one), method, packing_format=packing)
    weight = functools.partial(gptq_weight, bits=4, minus_one=minus_one)
    report = assert_converted(folder, weight, 2.0**-7)
    assert report.kind == f"auto-round ({'v1' if minus_one else 'v2'})"
    assert "and as its weights show" in report.notes[0]


def test_layers_of_awq(make, assert_converted):
    folder = make(awq_layer(32), packing_format="auto_round:auto_awq", sym=True)
    assert assert_converted(folder, awq_weight, 2.0**-7).kind == "auto-round (gemm)"


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_widths_between_are_held_in_8_bits(bits, make, assert_converted):
    folder = make(gptq_layer(bits, 32), bits=bits, packing_format="auto_round:auto_gptq")
    weight = functools.partial(gptq_weight, bits=bits)
    report = assert_converted(folder, weight, 2.0 ** (bits - 11))
    assert report.layers == {"int, 8 bits, groups of 32": 14}


FLOATS = {"bits": 16, "data_type": "float"}


def test_layers_of_several_widths(tiny_base, make, tmp_path):
    extra = {LAYER: {"bits": 2, "group_size": 16}, "model.layers.1.mlp.up_proj": FLOATS}
    folder = make(gptq_layer(4, 32), packing_format="auto_round:auto_gptq", extra_config=extra)
    dense = load_file(tiny_base / "model.safetensors")

    def change(tensors):
        weight = dense[f"{LAYER}.weight"]
        for part, tensor in gptq_layer(2, 16)(LAYER, weight).items():
            tensors[f"{LAYER}.{part}"] = tensor.contiguous()
        plain = "model.layers.1.mlp.up_proj"
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            tensors.pop(f"{plain}.{part}")
        tensors[f"{plain}.weight"] = dense[f"{plain}.weight"]

    change_tensors(folder, change)
    report = graft.convert_model(folder, tmp_path / "out")
    assert sum(report.layers.values()) == len(linear_names(dense)) - 1
    assert not any("which the settings do not say" in note for note in report.notes)
    layers = dict(frozen_layers(graft.load(tmp_path / "out", dtype="float32")[0]))
    assert layers[LAYER].weight_format == IntGroupFormat(2, 16)
    weight = gptq_weight(load_file(folder / "model.safetensors"), LAYER, 2)
    torch.testing.assert_close(layers[LAYER].dense_weight().double(), weight, rtol=0, atol=1e-3)


def test_the_largest_code_of_v1_is_no_zero(make, tmp_path):
    """auto-round adds one and does not wrap: a stored 15 is a zero point of 16."""
    folder = make(gptq_layer(4, 32), packing_format="auto_round:auto_gptq")

    def change(tensors):
        tensors[f"{LAYER}.qzeros"][0, 0] |= 15

    change_tensors(folder, change)
    graft.convert_model(folder, tmp_path / "out")
    layer = dict(frozen_layers(graft.load(tmp_path / "out")[0]))[LAYER]
    offset, scale = layer.packed["offsets"][0, 0], layer.packed["scales"][0, 0]
    assert float(offset) == -16 * float(scale)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"packing_format": "auto_round:mlx"}, "packing_format is 'auto_round:mlx'; graft reads"),
        ({"packing_format": "auto_round:fp8_static"}, "packing_format is .*fp8_static"),
        ({"data_type": "mx_fp"}, "data_type is 'mx_fp'; graft reads integers here"),
        ({"data_type": "nv_fp", "act_bits": 4}, "2 problems"),
        ({"packing_format": "auto_round:llm_compressor", "spinquant_config": {"r1": 1}}, "rotated"),
        ({"rotation_config": {"hadamard_type": "x"}}, "the weights are rotated"),
        ({"extra_config": {LAYER: {"data_type": "fp"}}}, "extra_config, .*data_type is 'fp'"),
    ],
)
def test_other_grids_are_refused_by_name(settings, words, make, tmp_path):
    folder = make(gptq_layer(4, 32), **settings)
    with pytest.raises(GraftError, match=words):
        graft.convert_model(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_floats_lie_as_compressed_tensors_has_them(make, assert_dequantised):
    """MXFP4: 16 numbers of E2M1, two to a byte, and a power of two for 32 of them."""
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
    values = torch.cat([values, -values])
    generator, weights = torch.Generator().manual_seed(2), {}

    def quantise(name, weight):
        rows, columns = weight.shape
        packed = torch.randint(256, (rows, columns // 2), generator=generator).byte()
        scale = torch.randint(118, 124, (rows, columns // 32), generator=generator).byte()
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
        powers = 2.0 ** (scale.double() - 127).repeat_interleave(32, 1)
        weights[name] = values[codes.long()] * powers
        return {"weight_packed": packed, "weight_scale": scale}

    scheme = {"data_type": "mx_fp", "act_bits": 4, "act_data_type": "mx_fp_rceil"}
    folder = make(quantise, packing_format="auto_round:llm_compressor", **scheme)
    report = assert_dequantised(folder, weights, "MXFP4")
    assert report.kind == "auto-round (mx_fp)"
    assert any("rounds the inputs of quantised layers too" in note for note in report.notes)


def test_what_is_rounded_at_run_time_alone_is_told(make, tmp_path):
    folder = make(gptq_layer(4, 32), packing_format="auto_round:auto_gptq", static_kv_dtype="fp8")
    notes = graft.convert_model(folder, tmp_path / "out").notes
    assert any(note.startswith("rounding cached keys and values") for note in notes)
