"""A training on rows that are mapped from a file is the training on those in memory."""

from __future__ import annotations

from pathlib import Path

import pytest

import graft
from graft.data.load import load_train_and_eval
from graft.data.storage import bulk
from graft.data.storage.store import Chosen, Stored


def trained(base: Path, rows: Path, out: Path) -> tuple[bytes, str]:
    graft.finetune(
        graft.TrainConfig(
            model=str(base), data=str(rows), out=str(out), method="lora", steps=4, batch_size=4
        )
    )
    adapter = next((out / "adapter").glob("*.safetensors")).read_bytes()
    losses = [
        line.partition(' "step_seconds"')[0]
        for line in (out / "metrics.jsonl").read_text().splitlines()
    ]
    return adapter, "\n".join(losses)


def test_mapped_rows_train_the_same_adapter(
    tiny_base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    in_memory = trained(tiny_base, rows, tmp_path / "in-memory")
    monkeypatch.setattr(bulk, "FEW_ROWS", 10)
    monkeypatch.setattr(bulk, "_SMALL_FILE", 0)
    kinds = []

    def load(*arguments, **options):
        found = load_train_and_eval(*arguments, **options)
        assert isinstance(found[0].examples, Chosen)
        kinds.extend(map(type, found[0].examples._parts))
        return found

    monkeypatch.setattr("graft.api.run.prepare.load_train_and_eval", load)
    for name in ("encoded", "cached"):
        assert trained(tiny_base, rows, tmp_path / name) == in_memory
    assert kinds == [Stored, Stored]
