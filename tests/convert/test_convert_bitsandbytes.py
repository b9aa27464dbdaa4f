from __future__ import annotations

import json

import pytest
import torch
from foreign import change_tensors, foreign_folder, nf4_layer, nf4_weight
from safetensors.torch import load_file

import graft
from graft.adapters.attach import frozen_layers
from graft.errors import GraftError

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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (state(blocksize=128), "blocksize is 128; graft reads 64"),
        (state(shape=[64, 32]), r"shape is \[64, 32\]; graft reads \[32, 64\]"),
        (state(nested_offset=0.1), "nested_quant_map is missing"),
        (state(nested_offset=0.1, nested_blocksize=64), "nested_blocksize is 64"),
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
