"""The script for a GPU runs from end to end without one, so that none of its minutes is lost."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu_step.py"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    # One thread: the models are tiny, and others may want the cores.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, env=environment
    )


def table(folder: Path, name: str) -> list[dict[str, str]]:
    (path,) = folder.glob(f"{name}*.csv")
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton; pip install 'graft-llm[test]'"
)
def test_everything_in_its_dry_form(tmp_path: Path) -> None:
    result = run("--everything", "20", "--dry", "--out", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAIL" not in result.stdout and "left out" not in result.stdout
    assert "ok   cross_entropy" in result.stdout and "transformers: " in result.stdout
    (launches,) = table(tmp_path, "gpu-launches-dry")
    assert int(launches["PyTorch's operations"]) > 100
    steps = table(tmp_path, "gpu-everything-steps-dry")
    losses = {row["who"]: float(row["loss"]) for row in steps}
    assert losses["graft-qlora+graphs"] == pytest.approx(losses["graft-qlora"], rel=1e-3)


def test_launches_are_counted_without_a_gpu() -> None:
    result = run("--count", "--who", "graft-qlora")
    assert result.returncode == 0, result.stderr
    last = [line for line in result.stdout.splitlines() if " all " in line][-1]
    a_layer, a_step = map(int, last.split()[-2:])
    assert 0 < a_layer < a_step < 23 * a_layer + 200
