"""A file of metrics is read up to what is cut off, or is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graft.train.metrics import read_metrics

STEP = {"step": 1, "loss": 2.0, "learning_rate": 0.1, "step_seconds": 1.0, "tokens_per_second": 9}
GOOD = [{"step": 0, "eval_loss": 3.0}, STEP]


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 2, "loss": 1',
        "[]",
        "null",
        '{"loss": 1.0, "learning_rate": 1}',
        '{"step": "2"}',
        '{"step": true}',
        '{"step": NaN}',
        '{"step": 2, "loss": 1.0}',
        '{"step": 2, "step_seconds": 1}',
        '{"step": 2, "name": "\\u001b[2J"}',
        "[" * 100_000,
        '{"step": ' + "9" * 10_000 + "}",
        '{"step": ' + "9" * 400 + "}",
        '{"step": 2, "eval_loss": ' + "9" * 400 + "}",
        '{"step": 2, "note": 1' + " " * 10**6 + "}",
        "\xff\0",
    ],
)
def test_what_comes_before_a_line_that_is_none_is_read(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [*map(json.dumps, GOOD), line, json.dumps({"step": 3, "eval_loss": 1.0})]
    path.write_bytes("\n".join(lines).encode("latin-1"))
    assert read_metrics(path) == GOOD


def test_no_file_has_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []
