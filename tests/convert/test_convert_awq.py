from __future__ import annotations

import pytest
import torch
from foreign import awq_layer, awq_weight, change_tensors, foreign_folder

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


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"version": "gemv"}, "its version is 'gemv'; graft reads 'gemm'"),
        ({"version": "GEMV_FAST"}, "its version is 'gemv_fast'"),
        ({"bits": 8}, "bits is 8"),
        ({"zero_point": False}, "zero_point is false"),
        ({"version": "marlin", "zero_point": False}, "2 problems"),
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
