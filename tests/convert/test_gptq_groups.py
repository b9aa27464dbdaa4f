"""The groups of GPTQ's inputs: in order, in no order, and as other words for either."""

from __future__ import annotations

import functools

import pytest
import torch
from foreign import (
    change_settings,
    change_tensors,
    foreign_folder,
    gptq_layer,
    gptq_weight,
    linear_names,
)
from safetensors.torch import load_file

import graft
from graft.convert.config import ConvertConfig
from graft.errors import GraftError

LAYER = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
DEQUANTISE = ConvertConfig(dequantise=True)


@pytest.fixture
def make(tiny_base, tmp_path):
    def write(bits=4, group_size=32, **settings):
        settings = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group_size,
            "desc_act": False,
            "checkpoint_format": "gptq",
        } | settings
        return foreign_folder(
            tiny_base, tmp_path / "theirs", settings, gptq_layer(bits, group_size)
        )

    return write


def for_each_index(change):
    """Return a change of every g_idx."""

    def apply(tensors):
        for key in list(tensors):
            if key.endswith("g_idx"):
                changed = change(tensors.pop(key))
                if changed is not None:
                    tensors[key] = changed.contiguous()

    return apply


def shuffled(index):
    return index[torch.randperm(len(index), generator=torch.Generator().manual_seed(1))]


@pytest.mark.parametrize(
    "change",
    [torch.zeros_like, lambda _: None, lambda index: index.long()],
    ids=["zeros", "missing", "int64"],
)
def test_an_index_that_says_nothing_is_no_activation_order(change, make, tmp_path):
    folder = make()
    graft.convert_model(folder, tmp_path / "first")
    change_tensors(folder, for_each_index(change))
    report = graft.convert_model(folder, tmp_path / "out")
    kept = [load_file(tmp_path / name / "model.safetensors") for name in ("first", "out")]
    assert all(torch.equal(kept[0][key], kept[1][key]) for key in kept[0])
    told = any("g_idx holds zeros alone" in note for note in report.notes)
    assert told == (change is torch.zeros_like)


def test_activation_order_comes_in_dequantised(make, logits, expected_logits, tmp_path):
    folder = make(desc_act=True)
    change_tensors(folder, for_each_index(shuffled))
    with pytest.raises(GraftError, match="14 weights are GPTQ of 4 bits in activation order"):
        graft.convert_model(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]
    report = graft.convert_model(folder, tmp_path / "out", config=DEQUANTISE)
    assert report.dense == {"GPTQ of 4 bits in activation order": 14}
    tensors = load_file(folder / "model.safetensors")
    names = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
    weights = {f"{name}.weight": gptq_weight(tensors, name, 4) for name in names}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in weights.items():
        assert torch.equal(stored[name].double(), weight), name
    reference = expected_logits(weights)
    found = logits(graft.load(tmp_path / "out", dtype="float32")[0])
    assert (found - reference).abs().max() <= 1e-5 * reference.abs().max()


def test_whole_groups_in_another_order_are_held(make, assert_converted):
    """Neighbours share a group, so only scales and zero points change their places."""
    folder = make()
    change_tensors(folder, for_each_index(lambda index: index.flip(0)))
    report = assert_converted(folder, functools.partial(gptq_weight, bits=4), 2.0**-7)
    assert report.layers == {"int, 4 bits, groups of 32": 14}


def test_integers_are_dequantised_without_rounding(make, tmp_path):
    """Zero points become offsets in float32, where float16 would round them."""
    folder = make(8)
    report = graft.convert_model(folder, tmp_path / "out", config=DEQUANTISE)
    assert report.rounding == 0.0 and set(report.dense.values()) == {14}
    tensors = load_file(folder / "model.safetensors")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name in linear_names(stored):
        assert torch.equal(stored[f"{name}.weight"].double(), gptq_weight(tensors, name, 8)), name


@pytest.mark.parametrize("change", [torch.zeros_like, lambda _: None], ids=["zeros", "missing"])
def test_activation_order_without_its_index_is_refused(change, make, tmp_path):
    folder = make(desc_act=True)
    change_tensors(folder, for_each_index(change))
    with pytest.raises(GraftError, match="its g_idx, which says how, is missing or holds zeros"):
        graft.convert_model(folder, tmp_path / "out", config=DEQUANTISE)
    change_settings(folder, static_groups=True)
    graft.convert_model(folder, tmp_path / "out")


@pytest.mark.parametrize("value", [-1, 2])
def test_an_index_of_no_group_is_refused(value, make, tmp_path):
    folder = make()
    index = torch.arange(64, dtype=torch.int32) // 32
    index[7] = value
    change_tensors(folder, lambda tensors: tensors.update({f"{LAYER}.g_idx": index}))
    with pytest.raises(GraftError, match="g_idx names groups from .* and there are 2"):
        graft.convert_model(folder, tmp_path / "out")


def test_groups_that_no_format_has_come_in_dequantised(make, tmp_path):
    """24 groups of 4 of the 96 inputs."""
    folder = make()

    def cut(tensors):
        for part in ("scales", "qzeros"):
            tensors[f"{DOWN}.{part}"] = tensors[f"{DOWN}.{part}"].repeat_interleave(8, 0)
        tensors[f"{DOWN}.g_idx"] = torch.arange(96, dtype=torch.int32) // 4

    change_tensors(folder, cut)
    with pytest.raises(GraftError, match="1 weights are GPTQ of 4 bits in groups of 4"):
        graft.convert_model(folder, tmp_path / "out")
    report = graft.convert_model(folder, tmp_path / "out", config=DEQUANTISE)
    assert report.dense["GPTQ of 4 bits in groups of 4"] == 1


def test_groups_that_could_be_of_several_sizes_need_to_be_said(make, tmp_path):
    """Two groups of 96 inputs are 48 and 48, or 64 and 32."""
    folder = make(group_size=64, checkpoint_format=None)
    change_tensors(folder, for_each_index(lambda _: None))
    graft.convert_model(folder, tmp_path / "said")
    change_settings(folder, group_size=None)
    with pytest.raises(GraftError, match=rf"{DOWN} has 2 groups of its 96 inputs, which may be of"):
        graft.convert_model(folder, tmp_path / "out")
    change_settings(
        folder, extra_config={f"model.layers.{n}.mlp.down_proj": {"group_size": 64} for n in (0, 1)}
    )
    graft.convert_model(folder, tmp_path / "out")
    kept = [load_file(tmp_path / name / "model.safetensors") for name in ("said", "out")]
    assert all(torch.equal(kept[0][key], kept[1][key]) for key in kept[0])
