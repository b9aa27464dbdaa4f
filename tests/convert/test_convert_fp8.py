"""FP8 folders, written by their description: blocks, rows, tensors, exponents, experts, casts."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from foreign import WEIGHTS, change_settings, change_tensors, foreign_folder, linear_names
from foreign_kinds import DEEPSEEK, blocks, fp8_layer
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM

import graft
from graft.convert.config import ConvertConfig
from graft.errors import GraftError

LAYER = "model.layers.0.mlp.gate_proj"
ASKED = ConvertConfig(dequantise=True)


def fp8_weight(tensors, name, block_of, scale_name):
    stored = tensors[f"{name}.weight"].double()
    row, column = block_of(stored.shape)
    scales = tensors[f"{name}.{scale_name}"].double()
    return stored * scales.reshape(int(row.max()) + 1, int(column.max()) + 1)[row, column]


KINDS = {
    "deepseek": (DEEPSEEK, blocks(48, 40), "weight_scale_inv", lambda s: s),
    "transformers": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        blocks(32, 16),
        "weight_scale_inv",
        lambda s: s.bfloat16().float(),
    ),
    "fbgemm": (
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        blocks(1, 10**6),
        "weight_scale",
        lambda s: s,
    ),
    "autofp8": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        blocks(10**6, 10**6),
        "weight_scale",
        lambda s: s.reshape(()),
    ),
    "rows": ({"quant_method": "fp8"}, blocks(1, 10**6), "scale", lambda s: s.reshape(-1)),
}


def test_short_last_blocks_are_cut_as_the_settings_say_or_not_at_all(tiny_base, tmp_path):
    def change(tensors):  # 192 rows with two scales: 128 and 64, or 96 and 96
        for name in linear_names(tensors):
            if name.endswith(("gate_proj", "up_proj")):
                tensors[f"{name}.weight"] = tensors[f"{name}.weight"].repeat(2, 1)
            if name.endswith("down_proj"):
                tensors[f"{name}.weight"] = tensors[f"{name}.weight"].repeat(1, 2) / 2

    wide = tmp_path / "wide"
    shutil.copytree(tiny_base, wide)
    change_tensors(wide, change)
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(config | {"intermediate_size": 192}))
    quantise = fp8_layer(blocks(128, 128), "weight_scale_inv")
    said = {"quant_method": "fp8"}  # Transformers' blocks are then of 128
    folder = foreign_folder(wide, tmp_path / "theirs", said, quantise)
    graft.convert_model(folder, tmp_path / "out", config=ASKED)
    stored, made = load_file(folder / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    for name in linear_names(load_file(wide / WEIGHTS)):
        expected = fp8_weight(stored, name, blocks(128, 128), "weight_scale_inv")
        assert torch.equal(made[f"{name}.weight"], expected.float())
    change_settings(folder, weight_block_size=None)
    with pytest.raises(GraftError, match=r"the sizes of its blocks do not follow"):
        graft.convert_model(folder, tmp_path / "again", config=ASKED)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_of_scales(kind, tiny_base, tmp_path, assert_dequantised):
    settings, block_of, scale, grid = KINDS[kind]
    quantise = fp8_layer(block_of, scale, grid=grid)
    folder = foreign_folder(tiny_base, tmp_path / "theirs", settings, quantise)
    change_tensors(folder, lambda t: t.update({f"{LAYER}.input_scale": torch.tensor(2.0)}))
    tensors = load_file(folder / WEIGHTS)
    names = linear_names(load_file(tiny_base / WEIGHTS))
    weights = {name: fp8_weight(tensors, name, block_of, scale) for name in names}
    report = assert_dequantised(folder, weights, "FP8")
    assert any("rounds the inputs of quantised layers too" in note for note in report.notes)
    assert not report.left_out


@pytest.mark.parametrize("kept", [torch.uint8, torch.float8_e8m0fnu])
def test_exponents_are_scales(kept, tiny_base, tmp_path, assert_dequantised):
    def quantise(_, weight):
        exponents = torch.randint(110, 120, (weight.shape[0], weight.shape[1] // 32)).byte()
        factors = 2.0 ** (exponents.double() - 127)
        stored = (weight / factors.repeat_interleave(32, 1)).to(torch.float8_e4m3fn)
        return {"weight": stored, "weight_scale_inv": exponents.view(kept)}

    settings = {"quant_method": "mxfp8"}
    folder = foreign_folder(tiny_base, tmp_path / "theirs", settings, quantise)
    tensors = load_file(folder / WEIGHTS)
    weights = {}
    for name in linear_names(load_file(tiny_base / WEIGHTS)):
        exponents = tensors[f"{name}.weight_scale_inv"].view(torch.uint8).double()
        factors = (2.0 ** (exponents - 127)).repeat_interleave(32, 1)
        weights[name] = tensors[f"{name}.weight"].double() * factors
    assert_dequantised(folder, weights, "FP8")


VALUES = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)


def two_to_a_byte(packed):
    """Return the 4-bit floats of bytes [rows, n], float64 [rows, 2 n]."""
    rows = [[VALUES[code] for byte in row for code in (byte & 15, byte >> 4)] for row in packed]
    return torch.tensor(rows, dtype=torch.float64)


def test_four_bit_floats_in_bytes(tiny_base, tmp_path, assert_dequantised):
    def quantise(_, weight):
        rows, columns = weight.shape
        return {
            "weight": torch.randint(-128, 128, (rows, columns // 2)).to(torch.int8),
            "scale": torch.randint(118, 124, (rows, columns // 32))
            .byte()
            .view(torch.float8_e8m0fnu),
        }

    settings = DEEPSEEK | {"expert_dtype": "fp4", "scale_fmt": "ue8m0"}
    folder = foreign_folder(tiny_base, tmp_path / "theirs", settings, quantise)
    tensors = load_file(folder / WEIGHTS)
    weights = {}
    for name in linear_names(load_file(tiny_base / WEIGHTS)):
        exponents = tensors[f"{name}.scale"].view(torch.uint8).double()
        values = two_to_a_byte(tensors[f"{name}.weight"].view(torch.uint8).tolist())
        weights[name] = values * (2.0 ** (exponents - 127)).repeat_interleave(32, 1)
    assert_dequantised(folder, weights, "FP4 (E2M1)")


@pytest.fixture
def bare(tiny_base, tmp_path):
    """A folder whose linear layers were cast to 8 bits, and config.json says nothing."""
    shutil.copytree(tiny_base, tmp_path / "theirs")

    def cast(tensors):
        for name in linear_names(tensors):
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.float8_e4m3fn)

    change_tensors(tmp_path / "theirs", cast)
    return tmp_path / "theirs"


def test_weights_that_were_only_cast_are_their_values(bare, assert_dequantised):
    tensors = load_file(bare / WEIGHTS)
    names = linear_names(tensors)
    weights = {name: tensors[f"{name}.weight"].double() for name in names}
    report = assert_dequantised(bare, weights, "FP8")
    assert any("have no scales" in note for note in report.notes)


def test_such_weights_are_never_loaded_as_they_are(bare, tmp_path):
    with pytest.raises(GraftError, match=r"F8_E4M3, a quantised weight; bring it in with: graft"):
        graft.load(bare)
    with pytest.raises(GraftError, match=r"graft convert .* --dequantise --out NEW_FOLDER"):
        graft.export_model(bare, "gguf", tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{LAYER}.weight_scale_inv"), f"tensor {LAYER}.weight_scale .*missing"),
        (
            lambda t: t.update({f"{LAYER}.weight_scale": torch.ones(2, 2)}),
            f"{LAYER}.weight has {LAYER}.weight_scale_inv and {LAYER}.weight_scale; expected one",
        ),
        (
            lambda t: t.update({f"{LAYER}.weight_scale_inv": torch.ones(5, 2)}),
            r"has scales \[5, 2\] for a weight \[96, 64\], and blocks of \[48, 40\]",
        ),
        (
            lambda t: t.update({f"{LAYER}.weight_scale_inv": torch.ones(2, 2).long()}),
            "expected floats or exponents",
        ),
        (
            lambda t: t.update({f"{LAYER}.weight": torch.ones(96, 60).to(torch.float8_e5m2)}),
            r"has shape \[96, 60\]; expected \[96, 64\]",
        ),
        (
            lambda t: t.update({f"{LAYER}.pre_quant_scale": torch.ones(64)}),
            f"{LAYER}.pre_quant_scale is not zero, and the model .* has no such tensor",
        ),
        (
            lambda t: t.update({f"{LAYER}.weight_scale_inv": torch.full((2, 2), torch.nan)}),
            "is not finite",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, words, tiny_base, tmp_path):
    quantise = fp8_layer(blocks(48, 40), "weight_scale_inv")
    folder = foreign_folder(tiny_base, tmp_path / "theirs", DEEPSEEK, quantise)
    change_tensors(folder, change)
    with pytest.raises(GraftError, match=words):
        graft.convert_model(folder, tmp_path / "out", config=ASKED)
    assert not (tmp_path / "out").exists()


def test_a_word_of_fp8_without_such_tensors_is_told(tiny_base, tmp_path, logits):
    folder = foreign_folder(tiny_base, tmp_path / "theirs", DEEPSEEK | {"new": 1}, None, names=[])
    report = graft.convert_model(folder, tmp_path / "out")
    assert not report.layers and not report.dense
    assert "config.json says fp8, and no tensor is quantised: the weights are as they are" in (
        report.notes
    )
    assert any("what graft does not read: 'new'" in note for note in report.notes)
    assert torch.equal(logits(graft.load(tmp_path / "out")[0]), logits(graft.load(tiny_base)[0]))


def test_the_experts_of_gpt_oss(tiny_base, tmp_path, logits):
    config = GptOssConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model, folder = GptOssForCausalLM(config).eval(), tmp_path / "theirs"
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    for name in ("gate_up_proj", "down_proj"):
        key = f"model.layers.0.mlp.experts.{name}"
        experts, columns, rows = tensors.pop(key).shape
        packed = torch.randint(0, 256, (experts, rows, columns // 32, 16)).byte()
        exponents = torch.randint(118, 124, packed.shape[:-1]).byte()
        tensors |= {f"{key}_blocks": packed, f"{key}_scales": exponents}
        values = two_to_a_byte(packed.reshape(-1, 16).tolist()).reshape(*packed.shape[:-1], 32)
        weight = values * 2.0 ** (exponents.double() - 127).unsqueeze(-1)
        weight = weight.flatten(-2).transpose(1, 2)
        model.get_parameter(key).data = weight.float()
    model.config.save_pretrained(folder)
    for file in tiny_base.glob("tokenizer*"):
        shutil.copy(file, folder)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    written["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(written))
    with pytest.raises(GraftError, match=r"2 weights are MXFP4 .* add --dequantise"):
        graft.convert_model(folder, tmp_path / "out")
    report = graft.convert_model(folder, tmp_path / "out", config=ASKED)
    assert report.dense == {"MXFP4": 2}
    stored = load_file(tmp_path / "out" / WEIGHTS)
    for key, expected in model.state_dict().items():
        assert torch.equal(stored[key], expected)
    found = logits(graft.load(tmp_path / "out", dtype="float32")[0])
    torch.testing.assert_close(found, logits(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("said", "told"), [({"ignored_layers": [LAYER]}, 0), ({}, 1), ({"ignore": 3}, 1)]
)
def test_layers_that_the_settings_leave_out_are_not_told(said, told, tiny_base, tmp_path):
    names = [name for name in linear_names(load_file(tiny_base / WEIGHTS)) if name != LAYER]
    quantise = fp8_layer(blocks(10**6, 10**6), "weight_scale")
    settings = {"quant_method": "fp8", "activation_scheme": "static"} | said
    folder = foreign_folder(tiny_base, tmp_path / "theirs", settings, quantise, names)
    report = graft.convert_model(folder, tmp_path / "out", config=ASKED)
    assert sum("which the settings do not say" in note for note in report.notes) == told
