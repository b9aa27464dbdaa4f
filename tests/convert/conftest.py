from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

import graft
from graft.adapters.attach import frozen_layers
from graft.api.convert import ConvertReport
from graft.convert.config import ConvertConfig
from graft.errors import GraftError
from graft.formats.int_group import IntGroupFormat

TOKENS = torch.arange(60).reshape(2, 30) + 5


@pytest.fixture
def logits() -> Callable[[torch.nn.Module], Tensor]:
    def compute(model: torch.nn.Module) -> Tensor:
        with torch.no_grad():
            return model(input_ids=TOKENS).logits

    return compute


@pytest.fixture
def expected_logits(tiny_base: Path, logits) -> Callable[[dict[str, Tensor]], Tensor]:
    """Return Transformers' logits of the tiny base with other weights."""

    def compute(weights: dict[str, Tensor]) -> Tensor:
        model = LlamaForCausalLM.from_pretrained(tiny_base).eval()
        for name, weight in weights.items():
            model.get_parameter(name).data = weight.float()
        return logits(model)

    return compute


@pytest.fixture
def assert_converted(tmp_path: Path, logits, expected_logits):
    """Convert a folder and compare it with what its layers mean, float64 by layer."""

    def check(
        folder: Path, weight_of: Callable[[dict[str, Tensor], str], Tensor], steps: float
    ) -> ConvertReport:
        report = graft.convert_model(folder, tmp_path / "out")
        tensors = load_file(folder / "model.safetensors")
        model, _ = graft.load(tmp_path / "out", dtype="float32")
        layers = dict(frozen_layers(model))
        assert len(layers) == 14
        weights = {name: weight_of(tensors, name) for name in layers}
        largest = 0.0
        for name, layer in layers.items():
            found = layer.dense_weight(torch.float32).double()
            if isinstance(layer.weight_format, IntGroupFormat):
                scales = layer.packed["scales"].double().abs()
                step = scales.repeat_interleave(layer.weight_format.group_size, -1)
                error = (found - weights[name]).abs() / step[:, : found.shape[1]]
                largest = max(largest, float(error.max()))
            else:
                torch.testing.assert_close(found, weights[name], rtol=2.5e-7, atol=0)
        assert report.rounding <= steps
        assert largest <= report.rounding + 1e-6
        reference = expected_logits({f"{name}.weight": w for name, w in weights.items()})
        difference = (logits(model) - reference).abs().max() / reference.abs().max()
        assert difference <= 1e-5 + steps
        return report

    return check


@pytest.fixture
def assert_dequantised(tmp_path: Path, logits, expected_logits):
    """Convert a folder that no format holds, and compare it with what its weights mean."""

    def check(folder: Path, weights: dict[str, Tensor], quantisation: str) -> ConvertReport:
        with pytest.raises(GraftError, match="add --dequantise to bring them in as floats"):
            graft.convert_model(folder, tmp_path / "out")
        asked = ConvertConfig(dequantise=True)
        report = graft.convert_model(folder, tmp_path / "out", config=asked)
        assert report.dense == {quantisation: len(weights)} and not report.layers
        stored = load_file(tmp_path / "out" / "model.safetensors")
        for name, weight in weights.items():
            torch.testing.assert_close(stored[f"{name}.weight"].double(), weight, rtol=1e-7, atol=0)
        reference = expected_logits({f"{name}.weight": w for name, w in weights.items()})
        found = logits(graft.load(tmp_path / "out", dtype="float32")[0])
        assert (found - reference).abs().max() <= 1e-5 * reference.abs().max()
        return report

    return check
