from __future__ import annotations

import functools
import json

import pytest
import torch
from foreign import (
    awq_layer,
    awq_weight,
    change_settings,
    change_tensors,
    foreign_folder,
    gemv_layer,
    gemv_weight,
)

import graft
from graft.errors import GraftError

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture
def make(tiny_base, tmp_path):
    def write(group_size=32, **settings):
        settings = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group_size,
            "version": "gemm",
            "zero_point": True,
        } | settings
        return foreign_folder(tiny_base, tmp_path / "theirs", settings, awq_layer(group_size))

    return write


@pytest.mark.parametrize("group_size", [32, -1])
def test_weights(group_size, make, assert_converted):
    report = assert_converted(make(group_size), awq_weight, 2.0**-7)
    assert report.kind == "AWQ (gemm)"
    assert report.rounding > 0.0


def test_version_gemv(tiny_base, assert_converted, tmp_path):
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}
    folder = foreign_folder(tiny_base, tmp_path / "theirs", settings, gemv_layer(32))
    weight = functools.partial(gemv_weight, group_size=32)
    assert assert_converted(folder, weight, 2.0**-7).kind == "AWQ (gemv)"
    change_settings(folder, group_size=24)
    with pytest.raises(GraftError, match="group_size is 24, which does not divide its 64 inputs"):
        graft.convert_model(folder, tmp_path / "again")


@pytest.mark.parametrize("version", ["exllama", "IPEX", None])
def test_versions_that_compute_otherwise_have_the_same_files(version, make, assert_converted):
    assert_converted(make(version=version, zero_point=False), awq_weight, 2.0**-7)


def set_apart(folder, name, settings):
    """Move the settings out of config.json into a file of their own."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    if name:
        (folder / name).write_text(json.dumps(settings))


OLD = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("quant_config.json", OLD, "its settings are those of quant_config.json"),
        ("quantize_config.json", OLD, "its settings are those of quantize_config.json"),
        (
            "quantize_config.json",
            {"quant_method": "awq", "bits": 4, "group_size": 32},
            "its settings are those of quantize_config.json",
        ),
        (None, None, "its quantisation is known by its tensors alone"),
    ],
)
def test_settings_may_lie_elsewhere_or_nowhere(
    name, settings, words, make, assert_converted, tmp_path
):
    folder = make()
    set_apart(folder, name, settings)
    report = assert_converted(folder, awq_weight, 2.0**-7)
    assert report.kind == "AWQ (gemm)" and words in report.notes[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"version": "GEMV_FAST"}, "its version is 'gemv_fast'; graft reads 'gemm' and 'gemv'"),
        ({"bits": 8}, "bits is 8"),
        ({"version": "marlin", "bits": 3}, "2 problems"),
        ({"rotation": "hadamard"}, "rotation is 'hadamard': the weights are rotated"),
    ],
)
def test_other_versions_are_refused_by_name(settings, words, make, tmp_path):
    with pytest.raises(GraftError, match=words):
        graft.convert_model(make(**settings), tmp_path / "out")


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("qzeros", torch.zeros(3, 12, dtype=torch.int32), r"qzeros is int32 \[3, 12\]; expected"),
        ("scales", torch.ones(3, 96).half(), "3 groups of its 64 inputs, which are not equal"),
        ("scales", torch.ones(96).half(), r"scales has shape \[96\]; expected a matrix"),
    ],
)
def test_what_does_not_fit_is_refused(part, value, words, make, tmp_path):
    folder = make()
    parts = {f"{LAYER}.{part}": value}
    if "equal" in words:
        parts[f"{LAYER}.qzeros"] = torch.zeros(3, 12, dtype=torch.int32)
    change_tensors(folder, lambda tensors: tensors.update(parts))
    with pytest.raises(GraftError, match=words):
        graft.convert_model(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
