"""What a training step would launch on a GPU, counted on the CPU: a bound for each method.

A GPU waits for launches where a model is small, and nobody sees one more in a test of results.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
A_LAYER = {"lora": 77, "qlora": 91, "qalora": 113, "affine": 84}
"""What a decoder layer may launch, forward and backward together."""
A_STEP_BESIDE = 80
"""What a step may launch beside its layers: batch, embeddings, loss, clipping, optimizer."""


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    import _launches

    yield _launches
    for name in set(sys.modules) - before:
        if name.startswith("_") and Path(sys.modules[name].__file__ or "").parent == BENCHMARKS:
            del sys.modules[name]


@pytest.mark.parametrize("method", A_LAYER)
def test_launches_of_a_layer_and_of_a_step(launches: ModuleType, method: str) -> None:
    rows = launches.launch_table(method, 2)
    total = rows[-1]
    assert total["where"] == "all"
    shown = "\n".join(map(str, rows))
    assert 0.8 * A_LAYER[method] <= total["a layer"] <= A_LAYER[method], shown
    assert total["a step"] - 2 * total["a layer"] <= A_STEP_BESIDE, shown


def test_a_step_waits_for_the_gpu_a_few_times(launches: ModuleType) -> None:
    waits = launches.step_launches("qlora", 1).waits
    assert waits == launches.step_launches("qlora", 2).waits, "none of them in a layer"
    assert sum(waits.values()) <= 6, waits
