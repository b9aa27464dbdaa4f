"""The plan of rows that lie one behind the other."""

from __future__ import annotations

import pytest
from test_plan_memory import plan, row


def test_packed_rows_are_planned_for_their_own_tokens(model_folder) -> None:
    folder = model_folder("llama")
    shape = {"batch_size": 8, "sequence_length": 40, "checkpointing": "layers"}
    padded = plan(folder, **shape)
    packed = plan(folder, **shape, tokens=100)
    kept = row(padded, "activations") / (8 * 40)
    assert row(packed, "activations") == pytest.approx(100 * kept, rel=1e-6)
    assert "100 tokens of packed rows" in str(packed.table())
    assert row(packed, "evaluation") == row(padded, "evaluation"), "it pads"
    assert plan(folder, **shape, tokens=8 * 40).as_dict() == padded.as_dict()
