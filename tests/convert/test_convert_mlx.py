from __future__ import annotations

import functools
import json

import pytest
import torch
from foreign import (
    change_settings,
    change_tensors,
    foreign_folder,
    linear_names,
    mlx_layer,
    mlx_weight,
)
from safetensors.torch import load_file

import graft
from graft.convert.grids.integers import unpack_words
from graft.errors import GraftError
from graft.export.layers import side_by_side
from graft.formats.int_group import IntGroupFormat
from graft.kernels.packed.planes import unpack_codes
from graft.layers.frozen import FrozenLinear

LAYER = "model.layers.0.mlp.gate_proj"
EMBEDDING = "model.embed_tokens"


@pytest.fixture
def make(tiny_base, tmp_path):
    def write(bits=4, dtype=torch.float16, names=None, **settings):
        settings = {"group_size": 32, "bits": bits} | settings
        layer = mlx_layer(bits, 32, dtype)
        return foreign_folder(tiny_base, tmp_path / "theirs", settings, layer, names)

    return write


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_width_and_dtype(bits, dtype, make, assert_converted):
    # Down to 2^-14 what is in bfloat16 is in float16 too; float32 has bits that it has not.
    steps = 2.0 ** (bits - 10) if dtype == torch.float32 else 0.0
    report = assert_converted(make(bits, dtype), functools.partial(mlx_weight, bits=bits), steps)
    assert report.layers == {f"int, {bits} bits, groups of 32": 14}
    assert (report.rounding > 0) == (steps > 0)


def test_embeddings_are_dequantised(tiny_base, make, tmp_path):
    names = [*linear_names(load_file(tiny_base / "model.safetensors")), EMBEDDING]
    folder = make(names=names)
    report = graft.convert_model(folder, tmp_path / "out")
    assert report.dequantised == (EMBEDDING,)
    stored = load_file(tmp_path / "out" / "model.safetensors")[f"{EMBEDDING}.weight"]
    expected = mlx_weight(load_file(folder / "model.safetensors"), EMBEDDING, 4)
    assert torch.equal(stored, expected.float())
    assert graft.load(tmp_path / "out", dtype="float32")[0].lm_head.weight.equal(stored)


def test_layers_may_have_widths_of_their_own(tiny_base, make, tmp_path):
    folder = make()
    weight = load_file(tiny_base / "model.safetensors")[f"{LAYER}.weight"]
    own = mlx_layer(8, 64, torch.float16)(LAYER, weight)
    change_tensors(folder, lambda t: t.update({f"{LAYER}.{k}": v for k, v in own.items()}))
    change_settings(folder, **{LAYER: {"group_size": 64, "bits": 8}})
    report = graft.convert_model(folder, tmp_path / "out")
    assert report.layers["int, 8 bits, groups of 64"] == 1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_stream_is_the_one_that_the_export_writes(bits):
    codes = torch.randint(2**bits, (5, 64)).byte()
    weight_format = IntGroupFormat(bits, 32)
    grid = {"scales": torch.ones(5, 2).half(), "offsets": torch.zeros(5, 2).half()}
    layer = FrozenLinear(64, 5, weight_format, weight_format.pack_codes(codes, grid))
    words = side_by_side(layer, bits, 64).view(torch.int32)
    assert torch.equal(unpack_words(words, bits), codes)


def test_there_and_back_gives_the_same_integers(tiny_base, make, tmp_path):
    """MLX to graft to MLX: the file's codes, scales and biases are those that came in."""
    folder = make()
    graft.convert_model(folder, tmp_path / "out")
    graft.export_model(tmp_path / "out", "mlx", tmp_path / "again")
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "again" / "model.safetensors")
    for name in linear_names(before):
        for part in ("weight", "scales", "biases"):
            assert torch.equal(before[f"{name}.{part}"], after[f"{name}.{part}"])


@pytest.mark.parametrize(("bits", "held"), [(1, 2), (5, 8), (6, 8)])
def test_widths_between_lie_in_the_next(bits, held, make, assert_converted):
    report = assert_converted(make(bits), functools.partial(mlx_weight, bits=bits), 0.0)
    assert report.layers == {f"int, {held} bits, groups of 32": 14}


VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]).double()


def small_floats(mode):
    """Return what writes random bytes as weight and scales of one of the modes."""
    size, numbers = (16 if mode == "nvfp4" else 32), (1 if mode == "mxfp8" else 2)

    def quantise(_, weight):
        rows, columns = weight.shape
        stored = torch.randint(0, 0x7E, (rows, columns // numbers)).byte()  # no NaN in E4M3
        scales = torch.randint(
            *((20, 60) if mode == "nvfp4" else (118, 124)), (rows, columns // size)
        )
        return {"weight": stored.view(torch.uint32), "scales": scales.byte()}

    return quantise


def small_weight(tensors, name, mode):
    stored, scales = tensors[f"{name}.weight"].view(torch.uint8), tensors[f"{name}.scales"]
    if mode == "mxfp8":
        values = stored.view(torch.float8_e4m3fn).double()
    else:
        values = VALUES[torch.stack((stored & 15, stored >> 4), -1).flatten(1).int()]
    factors = 2.0 ** (scales.double() - 127)
    if mode == "nvfp4":
        factors = scales.view(torch.float8_e4m3fn).double()
    return values * factors.repeat_interleave(values.shape[1] // scales.shape[1], 1)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_modes_of_small_floats_are_dequantised(mode, tiny_base, tmp_path, assert_dequantised):
    size, bits = (16 if mode == "nvfp4" else 32), (8 if mode == "mxfp8" else 4)
    settings = {"group_size": size, "bits": bits, "mode": mode}
    folder = foreign_folder(tiny_base, tmp_path / "theirs", settings, small_floats(mode))
    tensors = load_file(folder / "model.safetensors")
    names = linear_names(load_file(tiny_base / "model.safetensors"))
    weights = {name: small_weight(tensors, name, mode) for name in names}
    assert_dequantised(folder, weights, f"MLX's {mode}")


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"mode": "nvfp4"}, f"says of {LAYER} that mode is 'nvfp4', and its tensors are 'affine'"),
        ({"bits": 8}, f"says of {LAYER} that bits is 8, and its tensors are 4"),
        (False, f"{LAYER} is not quantised, and its tensors are"),
    ],
)
def test_settings_of_a_layer_that_lie_are_refused(own, words, make, tmp_path):
    folder = make(**{LAYER: own})
    with pytest.raises(GraftError, match=words):
        graft.convert_model(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{LAYER}.biases"), f"tensor {LAYER}.biases is missing"),
        (lambda t: t.pop(f"{LAYER}.weight"), f"tensor {LAYER}.weight is missing"),
        (
            lambda t: t.update({f"{LAYER}.weight": torch.zeros(96, 9).to(torch.uint32)}),
            "4.5 bits each; MLX's have 1 to 8",
        ),
        (
            lambda t: t.update({f"{LAYER}.scales": torch.ones(96, 7)}),
            "7 groups of its 64 inputs",
        ),
        (
            lambda t: t.update({f"{LAYER}.biases": torch.full((96, 2), 1e5)}),
            f"{LAYER}: its scales or offsets are not finite in float16",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, words, make, tmp_path):
    folder = make()
    change_tensors(folder, change)
    with pytest.raises(GraftError, match=words):
        graft.convert_model(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_mlx_rearranges_is_refused(make, tmp_path):
    folder = make()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt_neox"}))
    with pytest.raises(GraftError, match="model_type is 'gpt_neox'; graft reads MLX folders of"):
        graft.convert_model(folder, tmp_path / "out")


def test_codes_are_kept(make, tmp_path):
    folder = make(3)
    graft.convert_model(folder, tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")
    planes = out[f"{LAYER}.codes"], out[f"{LAYER}.codes_high"]
    words = load_file(folder / "model.safetensors")[f"{LAYER}.weight"]
    assert torch.equal(unpack_codes(planes, 3, 64), unpack_words(words, 3))
