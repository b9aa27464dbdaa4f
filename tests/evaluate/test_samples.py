from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from graft.data.config import DataConfig
from graft.data.encode import EncodedData, Example
from graft.data.load import load_train_and_eval
from graft.errors import GraftError
from graft.evaluate.samples import continuations, prompt_length, sampled_rows
from graft.model.load import load_model


def test_samples_continue_what_stands_before_the_first_target(tiny_base: Path, rows: Path) -> None:
    loaded = load_model(str(tiny_base), dtype="float32")
    loaded.model.train()
    config = DataConfig(data=str(rows), max_length=48)
    _, held_out = load_train_and_eval(config, loaded.tokenizer, 48, 0)
    chosen = sampled_rows(held_out, 2, 64)
    assert chosen == held_out.examples[:2]
    state = torch.get_rng_state()
    found = continuations(loaded.model, loaded.tokenizer, chosen)
    assert torch.equal(torch.get_rng_state(), state) and loaded.model.training
    written = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    for one in found:
        row = next(row for row in written if row["prompt"] == one["prompt"].rstrip("\n"))
        assert row["completion"].startswith(one["reference"].strip()) and one["reference"].strip()
        assert one["text"]
    assert found == continuations(loaded.model, loaded.tokenizer, chosen)


def test_rows_without_prompts_or_room_have_no_samples() -> None:
    row = Example([1, 2, 3], [False, False, True], "row")
    assert prompt_length(row) == 2
    assert sampled_rows(EncodedData([row], "prompt"), 3, 3) == [row]
    assert sampled_rows(EncodedData([row], "text"), 0, 3) == []
    with pytest.raises(GraftError, match="--samples 2: text rows have no prompt"):
        sampled_rows(EncodedData([row], "text"), 2, 3)
    with pytest.raises(GraftError, match="leaves room"):
        sampled_rows(EncodedData([row], "prompt"), 2, 2)
