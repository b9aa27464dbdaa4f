"""torchao's flattened tensors, written by their description."""

from __future__ import annotations

import json

import pytest
import torch
from foreign_kinds import TORCHAO_DTYPE, torchao_folder, torchao_intx

import graft
from graft.errors import GraftError

LAYER = "model.layers.0.mlp.gate_proj"


def int8(weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    zero = torch.zeros_like(scale).to(torch.int8)
    codes = (weight / scale).round().to(torch.int8)
    attributes = {
        "block_size": [1, weight.shape[1]],
        "dtype": TORCHAO_DTYPE,
        "act_quant_kwargs": None,
    }
    parts = {"qdata": codes, "scale": scale, "zero_point": zero}
    return "Int8Tensor", attributes, parts, codes.double() * scale.double()


def int4(weight):
    groups = weight.unflatten(1, (-1, 32))
    low = groups.amin(-1)
    scale = ((groups.amax(-1) - low) / 15).half()
    zero = (low + 8 * scale.float()).half()
    codes = ((groups - low.unsqueeze(-1)) / scale.float().unsqueeze(-1)).round().clamp(0, 15) - 8
    signed = codes.flatten(1).to(torch.int8)
    packed = (signed[:, ::2] & 15) | signed[:, 1::2] << 4
    parts = {"qdata": packed, "scale": scale.T.contiguous(), "zero_point": zero.T.contiguous()}
    attributes = {"block_size": [1, 32], "shape": list(weight.shape)}
    meant = codes.double() * scale.double().unsqueeze(-1) + zero.double().unsqueeze(-1)
    return "Int4Tensor", attributes, parts, meant.flatten(1)


def float8(weight):
    scale = weight.abs().amax(1, keepdim=True) / 448
    stored = (weight / scale).to(torch.float8_e4m3fn)
    attributes = {"block_size": [1, weight.shape[1]], "mm_config": None, "dtype": TORCHAO_DTYPE}
    meant = stored.double() * scale.double()
    return "Float8Tensor", attributes, {"qdata": stored, "scale": scale}, meant


VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]).double()


def nvfp4(weight):
    rows, columns = weight.shape
    packed = torch.randint(0, 256, (rows, columns // 2)).byte()
    scale = (torch.rand(rows, columns // 16) + 0.5).to(torch.float8_e4m3fn)
    overall = torch.tensor(0.02)
    tall, wide = -(-rows // 128) * 128, -(-columns // 64) * 4
    tiles = torch.zeros(tall // 128, wide // 4, 32, 4, 4, dtype=torch.uint8)
    for row in range(rows):  # as cuBLAS takes them: rows r, r + 32, r + 64, r + 96 side by side
        for column in range(columns // 16):
            place = row // 128, column // 4, row % 32, row % 128 // 32, column % 4
            tiles[place] = scale.view(torch.uint8)[row, column]
    attributes = {"block_size": 16, "orig_dtype": TORCHAO_DTYPE, "is_swizzled_scales": True}
    parts = {"qdata": packed, "scale": tiles.reshape(tall, wide).view(torch.float8_e4m3fn)}
    values = VALUES[torch.stack((packed & 15, packed >> 4), -1).flatten(1).int()]
    factors = (overall * scale.float()).double().repeat_interleave(16, 1)
    return "NVFP4Tensor", attributes, parts | {"per_tensor_scale": overall}, values * factors


@pytest.fixture
def make(tiny_base, tmp_path):
    def write(quantise, change=lambda metadata, tensors: None):
        return torchao_folder(tiny_base, tmp_path / "theirs", quantise, change)

    return write


@pytest.mark.parametrize(
    ("quantise", "held", "steps"),
    [
        (int8, "int8", 0.0),
        (torchao_intx, "int, 4 bits, groups of 32", 2.0**-7),
        (int4, "int, 4 bits, groups of 32", 2.0**-7),
    ],
)
def test_integers_are_kept(quantise, held, steps, make, assert_converted):
    folder, weights = make(quantise)
    report = assert_converted(folder, lambda _, name: weights[name], steps)
    assert report.layers == {held: 14} and not report.left_out
    inputs = any("torchao rounds the inputs" in note for note in report.notes)
    assert inputs == (quantise is torchao_intx)


def test_zero_points_that_torchao_leaves_out_are_refused(make, tmp_path):
    def change(metadata, tensors):
        (key,) = (key for key in tensors if key.startswith(LAYER) and "zero_point" in key)
        tensors[key] = tensors[key] + 64

    folder, _ = make(int8, change)
    with pytest.raises(
        GraftError, match="zero_point is not zero, and torchao computes .* two ways"
    ):
        graft.convert_model(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("quantise", "words"), [(float8, "FP8"), (nvfp4, "NVFP4")])
def test_small_floats_are_dequantised(quantise, words, make, assert_dequantised):
    folder, weights = make(quantise)
    assert_dequantised(folder, weights, words)


def described(**changes):
    """Return a change of what the metadata say of a layer."""

    def change(metadata, tensors):
        found = json.loads(metadata[f"{LAYER}.weight"])
        metadata[f"{LAYER}.weight"] = json.dumps(
            found | {"_data": found["_data"] | changes} if "_type" not in changes else changes
        )

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            described(_type="Int4TilePackedTo4dTensor", _data={}),
            "Int4TilePackedTo4dTensor', which is laid out for the kernels of one kind of GPU",
        ),
        (described(_type="AffineQuantizedTensor", _data={}), "which is not read; graft reads Int8"),
        (described(rotation=3), "has 'rotation', which graft does not read of Intx"),
        (described(block_size=[1, 16]), r"block_size \[1, 16\]"),
        (
            described(target_dtype={"_type": "torch.dtype", "_data": "int3"}),
            "codes from -8 to 7, which 3 bits have not",
        ),
        (
            lambda m, t: t.update({f"{LAYER}._weight_act_pre_scale": torch.ones(64)}),
            "has 'act_pre_scale', which graft does not read",
        ),
        (lambda m, t: m.pop(f"{LAYER}.weight"), f"metadata say nothing of {LAYER}.weight"),
        (lambda m, t: t.pop(f"{LAYER}._weight_scale"), f"tensor {LAYER}._weight_scale is missing"),
        (lambda m, t: m.update({f"{LAYER}.weight": "{"}), "are no JSON"),
    ],
)
def test_what_is_not_read_is_refused_by_name(change, words, make, tmp_path):
    folder, _ = make(torchao_intx, change)
    with pytest.raises(GraftError, match=words):
        graft.convert_model(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
