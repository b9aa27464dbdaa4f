"""compressed-tensors' folders, written by their description."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from foreign import (
    WEIGHTS,
    change_settings,
    change_tensors,
    foreign_folder,
    linear_names,
)
from foreign_kinds import (
    compressed_settings,
    packed_layer,
    packed_settings,
    packed_words,
)
from safetensors.torch import load_file

import graft
from graft.convert.config import ConvertConfig
from graft.errors import GraftError

LAYER = "model.layers.0.mlp.gate_proj"
ASKED = ConvertConfig(dequantise=True)


def codes_of(packed, bits, count):
    """Return `count` codes of each row of words."""
    single = np.unpackbits(packed.contiguous().numpy().view(np.uint8), axis=1, bitorder="little")
    whole = single[:, : count * bits].reshape(len(single), count, bits).astype(int)
    return torch.from_numpy((whole << np.arange(bits)).sum(-1))


def in_whole_words(codes, bits):
    """Return rows of codes as they lie in older releases: no code crosses a word."""
    each = 32 // bits
    filled = np.pad(np.asarray(codes), ((0, 0), (0, -codes.shape[1] % each)))
    lots = filled.reshape(len(filled), -1, each)
    whole = sum(lots[..., place].astype(np.int64) << bits * place for place in range(each))
    return torch.from_numpy(whole.astype(np.uint32).view(np.int32))


def pack_weight(tensors, name, bits, group_size=32):
    """Return w = scale (q - zero), float64 [out, in]."""
    rows, columns = tensors[f"{name}.weight_shape"].tolist()
    codes = codes_of(tensors[f"{name}.weight_packed"], bits, columns)
    scales = tensors[f"{name}.weight_scale"].double()
    zeros = torch.full_like(scales, 2 ** (bits - 1))
    if f"{name}.weight_zero_point" in tensors:
        zeros = codes_of(tensors[f"{name}.weight_zero_point"].T, bits, rows).double().T
    group = torch.arange(columns) // (columns if group_size == -1 else group_size)
    group = tensors.get(f"{name}.weight_g_idx", group).long()
    return scales[:, group] * (codes - zeros[:, group])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_integers(bits, group_size, symmetric, tiny_base, tmp_path, assert_converted):
    layer = packed_layer(bits, group_size, symmetric)
    described = packed_settings(bits, group_size, symmetric)
    folder = foreign_folder(tiny_base, tmp_path / "theirs", described, layer)
    steps = 0.0 if symmetric else 2.0 ** (bits - 11)
    report = assert_converted(folder, lambda t, n: pack_weight(t, n, bits, group_size), steps)
    held = "int8" if bits == 8 and symmetric and group_size == -1 else f"int, {bits} bits"
    assert all(kind.startswith(held) for kind in report.layers) and not report.left_out
    assert report.kind == "compressed-tensors (pack-quantized)"


@pytest.mark.parametrize(("bits", "held"), [(1, 2), (3, 3), (6, 8)])
def test_every_width_has_a_place(bits, held, tiny_base, tmp_path, assert_converted):
    folder = foreign_folder(
        tiny_base, tmp_path / "theirs", packed_settings(bits), packed_layer(bits)
    )
    report = assert_converted(folder, lambda t, n: pack_weight(t, n, bits), 0.0)
    assert report.layers == {f"int, {held} bits, groups of 32": 14}


def test_the_settings_of_older_releases_have_another_name(tiny_base, tmp_path):
    layer, described = packed_layer(4), packed_settings(4)
    folder = foreign_folder(
        tiny_base, tmp_path / "theirs", described, layer, key="compression_config"
    )
    report = graft.convert_model(folder, tmp_path / "out")
    assert report.layers == {"int, 4 bits, groups of 32": 14}
    assert "compression_config" not in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize(
    ("targets", "told"),
    [([], True), (["Attention.nothing"], True), (["re:.*_proj$"], False), (["Linear"], False)],
)
def test_weights_that_no_group_means_are_told(targets, told, tiny_base, tmp_path):
    described = packed_settings(4)
    described["config_groups"]["group_0"]["targets"] = targets
    folder = foreign_folder(tiny_base, tmp_path / "theirs", described, packed_layer(4))
    report = graft.convert_model(folder, tmp_path / "out")
    assert any("config_groups does not mean all" in note for note in report.notes) == told


def test_codes_of_older_releases_do_not_cross_words(tiny_base, tmp_path):
    for name, pack in (("new", packed_words), ("old", in_whole_words)):
        layer = packed_layer(3, symmetric=False, pack=pack)
        folder = foreign_folder(
            tiny_base, tmp_path / name, packed_settings(3, symmetric=False), layer
        )
        graft.convert_model(folder, tmp_path / f"{name}-out")
    new, old = (load_file(tmp_path / f"{name}-out" / WEIGHTS) for name in ("new", "old"))
    assert all(torch.equal(new[key], old[key]) for key in new)


def test_groups_in_activation_order_are_dequantised(tiny_base, tmp_path, assert_dequantised):
    def order(columns):
        return torch.randperm(columns, generator=torch.Generator().manual_seed(columns))

    layer = packed_layer(4, order=order)
    folder = foreign_folder(tiny_base, tmp_path / "theirs", packed_settings(4), layer)
    tensors = load_file(folder / WEIGHTS)
    names = linear_names(load_file(tiny_base / WEIGHTS))
    weights = {name: pack_weight(tensors, name, 4) for name in names}
    assert_dequantised(folder, weights, "4-bit integers in activation order")


def in_order(columns):
    return torch.arange(columns)


def test_an_order_that_is_none_is_no_order(tiny_base, tmp_path, assert_converted):
    layer = packed_layer(4, order=in_order)
    folder = foreign_folder(tiny_base, tmp_path / "theirs", packed_settings(4), layer)
    report = assert_converted(folder, lambda t, n: pack_weight(t, n, 4), 0.0)
    assert report.layers == {"int, 4 bits, groups of 32": 14}


def bytes_layer(scales_of):
    def quantise(_, weight):
        scale = scales_of(weight) / 127
        return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}

    return quantise


BYTES = {
    "channel": lambda weight: weight.abs().amax(1, keepdim=True),
    "tensor": lambda weight: weight.abs().max().reshape(1),
}


@pytest.mark.parametrize("strategy", BYTES)
def test_eight_bits_a_row_are_int8(strategy, tiny_base, tmp_path, assert_converted):
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": strategy}
    described = compressed_settings("int-quantized", weights)
    described["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": True}
    layer = bytes_layer(BYTES[strategy])
    folder = foreign_folder(tiny_base, tmp_path / "theirs", described, layer)

    def meant(tensors, name):
        return tensors[f"{name}.weight"].double() * tensors[f"{name}.weight_scale"].double()

    report = assert_converted(folder, meant, 0.0)
    assert report.layers == {"int8": 14}
    assert any("rounds the inputs of quantised layers too" in note for note in report.notes)


def test_zero_points_may_all_be_zero(tiny_base, tmp_path, assert_converted):
    weights = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "channel"}

    def quantise(name, weight):
        parts = bytes_layer(BYTES["channel"])(name, weight)
        return parts | {"weight_zero_point": torch.zeros(len(weight), 1).to(torch.int8)}

    described = compressed_settings("int-quantized", weights)
    folder = foreign_folder(tiny_base, tmp_path / "theirs", described, quantise)

    def meant(tensors, name):
        return tensors[f"{name}.weight"].double() * tensors[f"{name}.weight_scale"].double()

    assert assert_converted(folder, meant, 0.0).layers == {"int8": 14}


def float_layer(_, weight):
    scale = weight.abs().amax(1, keepdim=True) / 448
    parts = {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
    return parts | {"input_scale": torch.ones(1)}


FLOAT = compressed_settings(
    "float-quantized", {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
)


def test_eight_bit_floats(tiny_base, tmp_path, assert_dequantised):
    folder = foreign_folder(tiny_base, tmp_path / "theirs", FLOAT, float_layer)
    tensors = load_file(folder / WEIGHTS)
    weights = {
        name: tensors[f"{name}.weight"].double() * tensors[f"{name}.weight_scale"].double()
        for name in linear_names(load_file(tiny_base / WEIGHTS))
    }
    assert not assert_dequantised(folder, weights, "FP8").left_out


VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]).double()


@pytest.mark.parametrize("kind", ["NVFP4", "MXFP4"])
def test_four_bit_floats(kind, tiny_base, tmp_path, assert_dequantised):
    size = 16 if kind == "NVFP4" else 32

    def quantise(_, weight):
        rows, columns = weight.shape
        parts = {"weight_packed": torch.randint(0, 256, (rows, columns // 2)).byte()}
        if kind == "MXFP4":
            return parts | {"weight_scale": torch.randint(118, 124, (rows, columns // 32)).byte()}
        scale = (torch.rand(rows, columns // 16) * 100 + 1).to(torch.float8_e4m3fn)
        return parts | {"weight_scale": scale, "weight_global_scale": torch.tensor([2000.0])}

    weights = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": size}
    described = compressed_settings(f"{kind.lower()}-pack-quantized", weights)
    folder = foreign_folder(tiny_base, tmp_path / "theirs", described, quantise)
    tensors, meant = load_file(folder / WEIGHTS), {}
    for name in linear_names(load_file(tiny_base / WEIGHTS)):
        stored = tensors[f"{name}.weight_packed"]
        values = VALUES[torch.stack((stored & 15, stored >> 4), -1).flatten(1).int()]
        scale = tensors[f"{name}.weight_scale"]
        if kind == "MXFP4":
            factors = 2.0 ** (scale.double() - 127)
        else:
            factors = (scale.float() / tensors[f"{name}.weight_global_scale"]).double()
        meant[name] = values * factors.repeat_interleave(size, 1)
    assert_dequantised(folder, meant, kind)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"transform_config": {"R1": {}}}, "transform_config rotates weights and inputs"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "format 'sparse-24-bitmask'; load"),
        ({"format": "marlin-24"}, "its format is 'marlin-24', which is sparse"),
        ({"config_groups": 3}, "config_groups is 3; expected groups"),
        ({"format": "int-quantized"}, "the format is 'int-quantized' there and 'pack-quantized'"),
    ],
)
def test_settings_that_change_the_weights_are_refused(change, words, tiny_base, tmp_path):
    folder = foreign_folder(tiny_base, tmp_path / "theirs", packed_settings(4), packed_layer(4))
    change_settings(folder, **change)
    with pytest.raises(GraftError, match=words):
        graft.convert_model(folder, tmp_path / "out", config=ASKED)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_bits": 8}, "num_bits is 8 there and 4 in the tensors"),
        ({"group_size": 64}, "group_size is 64 there and 32 in the tensors"),
        ({"strategy": "channel"}, "strategy is 'channel' there and 'group' in the tensors"),
        ({"symmetric": False}, "symmetric is False there and True in the tensors"),
        ({"type": "float"}, "type is 'float' there and 'int' in the tensors"),
    ],
)
def test_labels_that_lie_are_found(change, words, tiny_base, tmp_path):
    folder = foreign_folder(tiny_base, tmp_path / "theirs", packed_settings(4), packed_layer(4))
    weights = packed_settings(4)["config_groups"]["group_0"]["weights"] | change
    change_settings(folder, config_groups={"group_0": {"weights": weights}})
    with pytest.raises(GraftError, match=words):
        graft.convert_model(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{LAYER}.weight_scale"), f"tensor {LAYER}.weight_scale is missing"),
        (
            lambda t: t.update({f"{LAYER}.weight_shape": torch.tensor([64, 96])}),
            r"weight_shape is \[64, 96\]",
        ),
        (
            lambda t: t.update({f"{LAYER}.weight_packed": torch.zeros(96, 5).int()}),
            "5 words a row, too few or too many for 64 codes",
        ),
        (
            lambda t: t.update({f"{LAYER}.weight_g_idx": torch.zeros(64).int()}),
            "does not sort 64 inputs into 2 groups of 32",
        ),
        (
            lambda t: t.update({f"{LAYER}.weight": torch.ones(96, 64)}),
            "gate_proj has both weight and weight_packed",
        ),
        (
            lambda t: t.update({f"{LAYER}.bitmask": torch.ones(8).byte()}),
            "weights are stored sparse",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, words, tiny_base, tmp_path):
    folder = foreign_folder(tiny_base, tmp_path / "theirs", packed_settings(4), packed_layer(4))
    change_tensors(folder, change)
    with pytest.raises(GraftError, match=words):
        graft.convert_model(folder, tmp_path / "out")


def test_weights_that_were_not_compressed_are_refused(tiny_base, tmp_path):
    def quantise(_, weight):
        return {"weight": weight, "weight_scale": torch.ones(len(weight), 1)}

    folder = foreign_folder(tiny_base, tmp_path / "theirs", packed_settings(4), quantise)
    with pytest.raises(GraftError, match="float32 with scales: it was not compressed"):
        graft.convert_model(folder, tmp_path / "out")


def test_zero_points_of_fewer_groups_than_scales_are_refused(tiny_base, tmp_path):
    layer, described = packed_layer(4, symmetric=False), packed_settings(4, symmetric=False)
    folder = foreign_folder(tiny_base, tmp_path / "theirs", described, layer)
    key = f"{LAYER}.weight_zero_point"
    change_tensors(folder, lambda t: t.update({key: t[key][:, :1].contiguous()}))
    with pytest.raises(GraftError, match=r"is \[12, 1\]; expected one zero point for each of"):
        graft.convert_model(folder, tmp_path / "out")


def test_a_scale_for_each_column_of_a_square_weight_is_none_for_each_row(tiny_base, tmp_path):
    def quantise(_, weight):
        scale = weight.abs().amax(0, keepdim=True) / 127
        return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}

    described = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    folder = foreign_folder(tiny_base, tmp_path / "theirs", described, quantise)
    graft.convert_model(folder, tmp_path / "out", config=ASKED)
    stored, made = load_file(folder / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    for name in linear_names(load_file(tiny_base / WEIGHTS)):
        expected = stored[f"{name}.weight"].float() * stored[f"{name}.weight_scale"]
        torch.testing.assert_close(made[f"{name}.weight"], expected)


def test_an_overall_scale_of_two_numbers_is_refused(tiny_base, tmp_path):
    def quantise(_, weight):
        rows, columns = weight.shape
        return {
            "weight_packed": torch.zeros(rows, columns // 2).byte(),
            "weight_scale": torch.ones(rows, columns // 16).to(torch.float8_e4m3fn),
            "weight_global_scale": torch.ones(2),
        }

    described = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    folder = foreign_folder(tiny_base, tmp_path / "theirs", described, quantise)
    with pytest.raises(GraftError, match=r"float32 \[2\]; expected one float"):
        graft.convert_model(folder, tmp_path / "out", config=ASKED)
