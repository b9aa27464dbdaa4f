"""ModelOpt's folders, written by their description, and tools that are refused by their names."""

from __future__ import annotations

import json

import pytest
import torch
from foreign import WEIGHTS, change_tensors, foreign_folder, linear_names
from safetensors.torch import load_file

import graft
from graft.convert.config import ConvertConfig
from graft.errors import GraftError

LAYER = "model.layers.0.mlp.gate_proj"
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]).double()


def nvfp4(_, weight):
    rows, columns = weight.shape
    return {
        "weight": torch.randint(0, 256, (rows, columns // 2)).byte(),
        "weight_scale": (torch.rand(rows, columns // 16) + 0.5).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(0.02),
        "input_scale": torch.tensor(0.5),
    }


def nvfp4_weight(tensors, name):
    stored = tensors[f"{name}.weight"]
    values = VALUES[torch.stack((stored & 15, stored >> 4), -1).flatten(1).int()]
    factors = tensors[f"{name}.weight_scale"].float() * tensors[f"{name}.weight_scale_2"]
    return values * factors.double().repeat_interleave(16, 1)


def fp8(_, weight):
    scale = weight.abs().max() / 448
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale": scale, "input_scale": torch.tensor(0.5)}


def fp8_weight(tensors, name):
    return tensors[f"{name}.weight"].double() * tensors[f"{name}.weight_scale"].double()


KINDS = {"NVFP4": (nvfp4, nvfp4_weight), "FP8": (fp8, fp8_weight)}


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_its_weights_are_dequantised(kind, separate, tiny_base, tmp_path, assert_dequantised):
    quantise, weight_of = KINDS[kind]
    stated = {"quant_algo": kind, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    settings = {} if separate else {"quant_method": "modelopt"} | stated
    folder = foreign_folder(tiny_base, tmp_path / "theirs", settings, quantise)
    if separate:
        own = {"producer": {"name": "modelopt"}, "quantization": stated}
        (folder / "hf_quant_config.json").write_text(json.dumps(own))
    tensors = load_file(folder / WEIGHTS)
    names = linear_names(load_file(tiny_base / WEIGHTS))
    report = assert_dequantised(folder, {name: weight_of(tensors, name) for name in names}, kind)
    assert report.kind == f"ModelOpt ({kind})" and not report.left_out
    assert any("ModelOpt's runtime rounds the inputs" in note for note in report.notes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{LAYER}.weight_scale"), f"tensor {LAYER}.weight_scale is missing"),
        (lambda t: t.pop(f"{LAYER}.weight_scale_2"), f"expected {LAYER}.weight_scale_2, one float"),
        (
            lambda t: t.update({f"{LAYER}.pre_quant_scale": torch.ones(64)}),
            "with pre_quant_scale; graft reads FP8",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, words, tiny_base, tmp_path):
    settings = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    folder = foreign_folder(tiny_base, tmp_path / "theirs", settings, nvfp4)
    change_tensors(folder, change)
    with pytest.raises(GraftError, match=words):
        graft.convert_model(folder, tmp_path / "out", config=ConvertConfig(dequantise=True))


def test_other_algorithms_are_refused(tiny_base, tmp_path):
    settings = {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}
    folder = foreign_folder(tiny_base, tmp_path / "theirs", settings, nvfp4)
    with pytest.raises(GraftError, match=r"quant_algo is 'W4A16_AWQ'.*graft reads FP8"):
        graft.convert_model(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("method", "words"),
    [("aqlm", "AQLM, sums of"), ("eetq", "EETQ, bytes"), ("quanto", "quanto"), ("spqr", "SpQR")],
)
def test_tools_that_are_not_read_are_named_with_a_way_out(method, words, tiny_base, tmp_path):
    folder = foreign_folder(tiny_base, tmp_path / "theirs", {"quant_method": method}, nvfp4)
    with pytest.raises(GraftError, match=f"quantised by {words}.*dequantise it with its own tool"):
        graft.convert_model(folder, tmp_path / "out")


def test_such_tools_are_known_by_their_tensors_too(tiny_base, tmp_path):
    def quantise(_, weight):
        return {"Qidxs": torch.zeros(4, 4).long(), "SU": torch.ones(4)}

    folder = foreign_folder(tiny_base, tmp_path / "theirs", {}, quantise)
    with pytest.raises(GraftError, match="quantised by QuIP#, vectors from a codebook, rotated"):
        graft.convert_model(folder, tmp_path / "out")
