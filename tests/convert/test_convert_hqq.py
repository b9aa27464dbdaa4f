"""HQQ's folders, written by their description: safetensors and the pickle."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from foreign import WEIGHTS, change_tensors, foreign_folder, linear_names
from foreign_kinds import HQQ, hqq_described, hqq_encoded
from safetensors.torch import load_file

import graft
from graft.errors import GraftError

LAYER = "model.layers.0.mlp.gate_proj"


@pytest.fixture
def make(tiny_base, tmp_path):
    def write(bits=4, size=32, axis=1, settings=HQQ):
        """Return a folder of safetensors, and what each of its weights means."""
        weights = {}

        def quantise(name, weight):
            state, weights[name] = hqq_described(weight, bits, size, axis)
            state["encoded_state_dict"] = True
            return {part: hqq_encoded(value) for part, value in state.items()}

        folder = foreign_folder(tiny_base, tmp_path / "theirs", settings, quantise)
        return folder, weights

    return write


@pytest.mark.parametrize(("bits", "held"), [(8, 8), (4, 4), (3, 3), (2, 2), (1, 2)])
def test_groups_of_neighbours_are_kept(bits, held, make, assert_converted):
    folder, weights = make(bits)
    report = assert_converted(folder, lambda _, name: weights[name], 2.0 ** (max(bits, 2) - 10))
    assert report.layers == {f"int, {held} bits, groups of 32": 14}
    assert report.kind == "HQQ" and not report.left_out and not report.notes


@pytest.mark.parametrize("bits", [4, 3])
def test_groups_across_rows_are_dequantised(bits, make, assert_dequantised):
    folder, weights = make(bits, axis=0)
    words = f"HQQ's {bits}-bit integers in scattered groups"
    assert_dequantised(folder, weights, words)


def test_a_folder_that_says_nothing_of_it(make, assert_converted):
    folder, weights = make(settings={})
    assert assert_converted(folder, lambda _, name: weights[name], 2.0**-6).kind == "HQQ"


def pickle(base, folder, change=lambda found: None):
    """Write qmodel.pt as hqq does; return what each weight means."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns(WEIGHTS))
    tensors, found, weights = load_file(base / WEIGHTS), {}, {}
    for name in linear_names(tensors):
        found[name], weights[name] = hqq_described(tensors.pop(f"{name}.weight"), 4)
    for key, tensor in tensors.items():
        found.setdefault(key.rpartition(".")[0], {})[key.rpartition(".")[2]] = tensor
    change(found)
    torch.save(found, folder / "qmodel.pt")
    return weights


def test_the_pickle_is_read_without_running_it(tiny_base, tmp_path, expected_logits, logits):
    weights = pickle(tiny_base, tmp_path / "theirs")
    report = graft.convert_model(tmp_path / "theirs", tmp_path / "out")
    assert report.kind == "HQQ, pickled" and report.layers == {"int, 4 bits, groups of 32": 14}
    reference = expected_logits({f"{name}.weight": weight for name, weight in weights.items()})
    found = logits(graft.load(tmp_path / "out", dtype="float32")[0])
    assert (found - reference).abs().max() <= 1e-2 * reference.abs().max()
    named = tmp_path / "theirs" / "qmodel.pt"
    assert graft.convert_model(named, tmp_path / "again").layers == report.layers


class Runs:
    def __reduce__(self):
        return print, ("it ran",)


def test_a_pickle_that_would_run_code_is_refused(tiny_base, tmp_path, capsys):
    pickle(tiny_base, tmp_path / "theirs", lambda found: found[LAYER].update(scale=Runs()))
    with pytest.raises(GraftError, match="is refused: it holds more than tensors"):
        graft.convert_model(tmp_path / "theirs", tmp_path / "out")
    assert "it ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"packing": "6bit_u8"}, "has the packing '6bit_u8' of 4 bits; graft reads 8bit_u8"),
        ({"packing": "2bit_u8"}, "has 4 bits in the packing 2bit_u8, which is of others"),
        ({"nbits": 2}, "has 2 bits in the packing 4bit_u8, which is of others"),
        ({"group_size": 16}, r"scale is not of 384 groups|codes \[192, 32\]; expected \[384, 16\]"),
        ({"axis": 2}, "axis is 2; expected 0 or 1"),
        ({"shape": torch.Size([64, 96])}, r"shape is .*; expected \[96, 64\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, words, make, tmp_path):
    folder, _ = make()
    parts = {f"{LAYER}.{part}": hqq_encoded(value) for part, value in change.items()}
    change_tensors(folder, lambda tensors: tensors.update(parts))
    with pytest.raises(GraftError, match=words):
        graft.convert_model(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_letters_that_are_none_are_refused(make, tmp_path):
    folder, _ = make()
    change_tensors(folder, lambda t: t.update({f"{LAYER}.packing": torch.tensor([1.5e9])}))
    with pytest.raises(GraftError, match=f"{LAYER} is not understood: chr"):
        graft.convert_model(folder, tmp_path / "out")


def test_parts_that_are_not_known_are_refused(tiny_base, make, tmp_path):
    folder, _ = make()
    change_tensors(folder, lambda tensors: tensors.update({f"{LAYER}.rotation": torch.ones(64)}))
    with pytest.raises(GraftError, match=f"{LAYER}.rotation is not zero"):
        graft.convert_model(folder, tmp_path / "out")
    pickle(tiny_base, tmp_path / "pickled", lambda found: found[LAYER].update(rotation=3))
    with pytest.raises(GraftError, match=f"{LAYER} has rotation, which graft does not read of HQQ"):
        graft.convert_model(tmp_path / "pickled", tmp_path / "out")


def test_a_folder_of_quantised_layers_is_not_loaded_as_it_is(make):
    folder, _ = make()
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "hqq"
    with pytest.raises(GraftError, match="bring it in with: graft convert"):
        graft.load(folder)
