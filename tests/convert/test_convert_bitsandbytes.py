from __future__ import annotations

import json

import pytest
import torch
from foreign import change_tensors, foreign_folder, nf4_blocks, nf4_layer, nf4_weight
from safetensors.torch import load_file

import graft
from graft.adapters.attach import frozen_layers
from graft.errors import GraftError
from graft.kernels.packed.codebooks import dynamic_code

LAYER = "model.layers.0.self_attn.k_proj"
STATE = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"
SETTINGS = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.fixture
def make(tiny_base, tmp_path):
    return lambda: foreign_folder(tiny_base, tmp_path / "theirs", SETTINGS, nf4_layer)


def test_nf4_is_kept_bit_for_bit(tiny_base, make, assert_converted, tmp_path):
    shapes = {n: t.shape for n, t in load_file(tiny_base / "model.safetensors").items()}

    def weight(tensors, name):
        return nf4_weight(tensors, name, shapes[f"{name}.weight"])

    report = assert_converted(make(), weight, 0.0)
    assert report.layers == {"nf4": 14} and report.rounding == 0.0
    ours = load_file(tmp_path / "out" / "model.safetensors")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert torch.equal(ours[f"{LAYER}.codes"], theirs[f"{LAYER}.weight"].view(-1))
    assert torch.equal(ours[f"{LAYER}.absmax"], theirs[f"{LAYER}.weight.absmax"])


@pytest.mark.parametrize(("size", "held"), [(128, "nf4"), (512, "nf4"), (32, None)])
def test_other_sizes_of_blocks(
    size, held, tiny_base, tmp_path, assert_converted, assert_dequantised
):
    """Larger blocks are cut, which repeats their absmax; smaller ones are dequantised."""
    shapes = {n: t.shape for n, t in load_file(tiny_base / "model.safetensors").items()}
    folder = foreign_folder(tiny_base, tmp_path / "theirs", SETTINGS, nf4_blocks(size))

    def weight(tensors, name):
        return nf4_weight(tensors, name, shapes[f"{name}.weight"], size)

    if held:
        assert assert_converted(folder, weight, 0.0).layers == {held: 14}
        return
    tensors = load_file(folder / "model.safetensors")
    names = [key.removesuffix(".weight") for key in shapes if key.endswith("proj.weight")]
    assert_dequantised(
        folder, {name: weight(tensors, name) for name in names}, "nf4 in blocks of 32"
    )


def nested_blocks(size):
    """Return what quantises the absmax again, in blocks of `size`, as QLoRA does."""

    def quantise(name, weight):
        parts = nf4_layer(name, weight)
        absmax = parts.pop("weight.absmax")
        code, offset = dynamic_code(), float(absmax.mean())
        blocks = (absmax - offset).split(size)
        scales = torch.stack([block.abs().max() for block in blocks])
        codes = [
            (block[:, None] / scale - code).abs().argmin(1)
            for block, scale in zip(blocks, scales, strict=True)
        ]
        key = "weight.quant_state.bitsandbytes__nf4"
        described = json.loads(bytes(parts[key].tolist()))
        described |= {"nested_blocksize": size, "nested_offset": offset, "nested_dtype": "float32"}
        return parts | {
            key: torch.tensor(list(json.dumps(described).encode())).byte(),
            "weight.absmax": torch.cat(codes).byte(),
            "weight.nested_absmax": scales,
            "weight.nested_quant_map": code.clone(),
        }

    return quantise


@pytest.mark.parametrize(("size", "held"), [(256, "nf4, double quantised"), (16, "nf4")])
def test_nested_statistics(size, held, tiny_base, tmp_path, assert_converted):
    shapes = {n: t.shape for n, t in load_file(tiny_base / "model.safetensors").items()}
    folder = foreign_folder(tiny_base, tmp_path / "theirs", SETTINGS, nested_blocks(size))

    def weight(tensors, name):
        described = json.loads(bytes(tensors[STATE.replace(LAYER, name)].tolist()))
        scales = tensors[f"{name}.weight.nested_absmax"].repeat_interleave(size)
        codes = tensors[f"{name}.weight.absmax"]
        absmax = dynamic_code()[codes.int()] * scales[: len(codes)] + described["nested_offset"]
        plain = {f"{name}.weight.absmax": absmax, f"{name}.weight": tensors[f"{name}.weight"]}
        return nf4_weight(plain, name, shapes[f"{name}.weight"])

    assert assert_converted(folder, weight, 0.0).layers == {held: 14}


def test_the_oldest_settings_name_no_method(make, tmp_path):
    folder = make()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["quant_method"]
    (folder / "config.json").write_text(json.dumps(config))
    assert graft.convert_model(folder, tmp_path / "out").layers == {"nf4": 14}


def test_the_bytes_may_be_called_something_else(make, tmp_path):
    """bnb_4bit_quant_storage float32, with which FSDP shards them."""
    folder = make()
    name = f"{LAYER}.weight"
    change_tensors(folder, lambda t: t.update({name: t[name].view(-1).view(torch.float32)}))
    graft.convert_model(folder, tmp_path / "out")
    assert graft.load(tmp_path / "out")


def int8_layer(_, weight):
    rows = weight.abs().amax(1)
    codes = (weight * 127 / rows[:, None]).round().to(torch.int8)
    return {"weight": codes, "SCB": rows, "weight_format": torch.zeros((), dtype=torch.uint8)}


def test_llm_int8_keeps_its_codes(tiny_base, tmp_path, assert_converted):
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    folder = foreign_folder(tiny_base, tmp_path / "theirs", settings, int8_layer)

    def weight(tensors, name):
        return tensors[f"{name}.weight"].double() * tensors[f"{name}.SCB"].double()[:, None] / 127

    report = assert_converted(folder, weight, 0.0)
    assert report.layers == {"int8": 14}
    assert any("rounds the inputs of LLM.int8 layers too" in note for note in report.notes)
    layers = dict(frozen_layers(graft.load(tmp_path / "out")[0]))
    theirs = load_file(folder / "model.safetensors")[f"{LAYER}.weight"]
    assert torch.equal(layers[LAYER].packed["codes"], theirs)
    layout = {f"{LAYER}.weight_format": torch.ones((), dtype=torch.uint8)}
    change_tensors(folder, lambda t: t.update(layout))
    with pytest.raises(GraftError, match="not stored row by row"):
        graft.convert_model(folder, tmp_path / "other")


def state(**changes):
    def change(tensors):
        found = json.loads(bytes(tensors[STATE].tolist())) | changes
        tensors[STATE] = torch.tensor(list(json.dumps(found).encode())).byte()

    return change


def replaced(part, value):
    return lambda tensors: tensors.update({f"{LAYER}.{part}": value})


def test_an_int8_layer_of_two_layouts_is_refused(tiny_base, tmp_path):
    def quantise(_, weight):
        rows = weight.abs().amax(1)
        codes = (weight / rows[:, None] * 127).round().to(torch.int8)
        return {"weight": codes, "SCB": rows, "weight_format": torch.zeros(2).byte()}

    described = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    folder = foreign_folder(tiny_base, tmp_path / "theirs", described, quantise)
    with pytest.raises(GraftError, match=r"q_proj is not understood: .*one element"):
        graft.convert_model(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (state(blocksize=96), "blocksize is 96; expected a power of two"),
        (state(blocksize=128), r"absmax is float32 \[32\]; expected float32 \[16\]"),
        (state(shape=[64, 32]), r"shape is \[64, 32\]; expected \[32, 64\]"),
        (state(nested_offset=0.1), "nested_quant_map is missing"),
        (state(nested_offset=0.1, nested_blocksize="64"), "nested_blocksize is '64'"),
        (state(quant_type="fp4"), "quant_type is 'fp4'; expected 'nf4'"),
        (state(rotated=True), "it has 'rotated', which is not read"),
        (replaced("weight.quant_map", torch.linspace(-1, 1, 16)), "holds other values than nf4's"),
        (replaced("weight.absmax", torch.ones(3)), r"absmax is float32 \[3\]; expected float32"),
        (replaced("weight", torch.zeros(9, 1).byte()), "9 bytes of codes; expected 1024"),
        (lambda t: t.update({STATE: torch.zeros(4).byte()}), "is no JSON"),
        (lambda t: t.update({STATE: torch.zeros(4)}), "is no JSON"),
        (lambda t: t.update({STATE: torch.tensor(list(b"[1]")).byte()}), "holds no JSON object"),
        (lambda t: t.pop(f"{LAYER}.weight.absmax"), "absmax is missing"),
    ],
)
def test_what_differs_is_refused(change, words, make, tmp_path):
    folder = make()
    change_tensors(folder, change)
    with pytest.raises(GraftError, match=words):
        graft.convert_model(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_statistics_that_are_no_numbers_are_refused(make, tmp_path):
    folder = make()
    change_tensors(folder, lambda t: t[f"{LAYER}.weight.absmax"].fill_(float("nan")))
    with pytest.raises(GraftError, match=f"{LAYER}: absmax are not finite"):
        graft.convert_model(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
