"""The widths and modes of mlx-lm beside the usual ones, compared with what mlx dequantises."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import graft
from graft.convert.config import ConvertConfig

mx = pytest.importorskip("mlx.core", reason="needs mlx: make test-peers installs it")
mlx_lm = pytest.importorskip("mlx_lm", reason="needs mlx-lm: make test-peers installs it")


def dequantised(folder) -> dict[str, torch.Tensor]:
    """Return each quantised weight as mlx has it, float32."""
    model, _ = mlx_lm.load(str(folder))
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "group_size"):
            scales, biases = module.scales, module.get("biases")
            if biases is not None:  # mlx computes in the dtype of the statistics
                scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            weight = mx.dequantize(
                module.weight,
                scales,
                biases,
                module.group_size,
                module.bits,
                module.mode,
                dtype=mx.float32,
            )
            found[name] = torch.from_numpy(np.array(weight))
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"q_mode": "mxfp4", "q_group_size": 32, "q_bits": 4},
        {"q_mode": "mxfp8", "q_group_size": 32, "q_bits": 8},
        {"q_mode": "nvfp4", "q_group_size": 16, "q_bits": 4},
        {"q_group_size": 32, "q_bits": 1},
        {"q_group_size": 32, "q_bits": 5},
        {"q_group_size": 64, "q_bits": 6},
        {"q_group_size": 32, "quant_predicate": "mixed_3_6"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_weights(options, base, tmp_path):
    folder, out = tmp_path / "theirs", tmp_path / "out"
    mlx_lm.convert(str(base), str(folder), quantize=True, dtype="float16", **options)
    report = graft.convert_model(folder, out, config=ConvertConfig(dequantise=True))
    model = graft.load(out, dtype="float32")[0]
    theirs = dequantised(folder)
    assert sum(report.dense.values()) == 14 and len(theirs) == 16
    for name, weight in theirs.items():
        torch.testing.assert_close(model.get_parameter(f"{name}.weight"), weight, rtol=0, atol=1e-7)
    if "q_mode" not in options:
        report = graft.convert_model(folder, tmp_path / "kept")
        assert sum(report.layers.values()) == 14 and report.rounding == 0.0
