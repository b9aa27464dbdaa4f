"""One trained run through every runtime: the weights of each file, and what is computed with it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import graft
from graft.adapters.attach import frozen_layers
from graft.export.registry import TARGETS

FLOAT32_ROUNDING = 2.5e-7
"""Of a weight, as a share of its matrix's largest: q - z and the product with s each round."""
CASES = [
    *((4, target) for target in ("gguf", "mlx", "onnx", "openvino", "hf")),
    *((3, target) for target in ("gguf", "mlx")),
    *((2, target) for target in ("gguf", "mlx", "onnx")),
]


@pytest.fixture(scope="module")
def runs(tiny_base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A trained run at each width; none of them learns much, and all of them moved."""
    folder = tmp_path_factory.mktemp("runs")
    for bits in (2, 3, 4):
        graft.finetune(
            graft.TrainConfig(
                model=str(tiny_base),
                data=str(rows),
                eval_fraction=0.5,
                method="qalora",
                bits=bits,
                steps=4,
                batch_size=4,
                learning_rate=0.02,
                out=str(folder / str(bits)),
            )
        )
    return {bits: folder / str(bits) for bits in (2, 3, 4)}


@pytest.mark.parametrize(("bits", "target"), CASES)
def test_a_trained_run(
    bits: int, target: str, runs: dict[int, Path], readers: Any, tmp_path: Path
) -> None:
    entry = TARGETS[target]
    module, packages = entry.runtime
    for needed in {module, entry.package or module}:
        if find_spec(needed) is None:
            pytest.skip(f"needs {packages}: make test-peers installs it")
    run = runs[bits]
    path = tmp_path / entry.default_name
    graft.export_model(run, target, path)
    graft.merge(run, tmp_path / "merged")
    merged, _ = graft.load(tmp_path / "merged")
    ours = {name: layer.dense_weight() for name, layer in frozen_layers(merged)}
    ours["model.embed_tokens"] = merged.get_input_embeddings().weight.detach()
    assert len(ours) == 15
    difference = readers.largest_difference(ours, readers.read_weights(target, path, merged.config))
    assert difference <= (FLOAT32_ROUNDING if target in ("onnx", "openvino") else 0.0)

    found = graft.verify(run, path)
    assert found.passed and found.texts == 20
    assert found.fidelity.mean_kl <= 1e-3
    assert abs(found.fidelity.other_perplexity / found.fidelity.perplexity - 1) <= 0.005
    if target != "gguf":  # llama.cpp rounds activations to 8 bits, and near-ties may turn
        assert found.fidelity.logit_difference <= 2e-3
        assert found.equal_texts == 20


def test_another_weight_is_seen(runs: dict[int, Path], readers: Any, tmp_path: Path) -> None:
    """The comparison can fail: the untrained base is not the trained model."""
    graft.export_model(runs[4] / "base", "hf", tmp_path / "base")
    graft.export_model(runs[4], "hf", tmp_path / "trained")
    base, trained = (
        readers.read_weights("hf", tmp_path / name, None) for name in ("base", "trained")
    )
    assert readers.largest_difference(trained, base) > 1e-3
