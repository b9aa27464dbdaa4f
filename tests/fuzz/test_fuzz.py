"""A short campaign with fixed seeds; the long one is benchmarks/fuzz.py."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_json import VALUES, dump, other_spelling, structured
from fuzz_mutation import Expect

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "fuzz.py"
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads sizes from Linux's /proc")


@LINUX
def test_mutated_files_end_in_an_error_of_ours_or_in_a_right_answer(tmp_path) -> None:
    out = tmp_path / "results.json"
    command = [sys.executable, str(SCRIPT), "--small", "--rounds", "50", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    results = json.loads(out.read_text())
    assert results["rounds"] == 50 == sum(results["total"].values())
    assert results["total"]["ok"] > 10 and results["total"]["refused"] > 10


def test_mutations_are_those_of_their_seed_and_say_what_they_did() -> None:
    data = json.dumps({"a": [1, {"b": 2}], "c": "text"}).encode()
    for seed in range(50):
        first, second = (structured(data, random.Random(seed)) for _ in range(2))
        assert first == second and first.what
        if first.expect is Expect.SAME:
            assert json.loads(first.data or b"") == json.loads(data)
    assert json.loads(other_spelling(data, random.Random(0)).data or b"") == json.loads(data)
    for value in VALUES:
        assert dump({"key": value}).startswith(b"{")
