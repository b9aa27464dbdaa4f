"""What every objective says of itself, and what is recorded of the next token's."""

from __future__ import annotations

import math

import pytest
import torch

from graft.data.batches import IGNORED, Batch
from graft.data.encode import Example
from graft.data.shapes.registry import SHAPES
from graft.errors import GraftError
from graft.evaluate.loss import evaluate_loss
from graft.model.load import load_model
from graft.objectives.base import LossResult
from graft.objectives.registry import DEFAULT_OBJECTIVE, OBJECTIVES
from graft.train.config import LoopConfig


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_it_says_which_rows_it_takes(name):
    objective = OBJECTIVES[name]
    assert objective.name == name
    assert OBJECTIVES.summary(name)
    taken = [shape for shape in SHAPES if objective.takes(SHAPES[shape])]
    assert taken, "there are no rows that it could be trained on"
    for shape in SHAPES:
        if shape in taken:
            objective.check_rows(shape)
        else:
            with pytest.raises(GraftError, match=f"{name} cannot be trained on {shape} rows"):
                objective.check_rows(shape)
    assert "eval_loss" in objective.evaluation(LossResult(1.0, 2))


def test_a_batch_counts_its_targets_and_moves_as_a_whole():
    labels = torch.tensor([[7, 5, IGNORED], [3, IGNORED, IGNORED]])
    batch = Batch(torch.zeros(2, 3, dtype=torch.int64), labels)
    assert batch.targets == 1, "position 0 is never predicted"
    moved = batch.to(torch.device("meta"))
    assert moved.input_ids.device.type == moved.labels.device.type == "meta"


def test_the_next_token_is_the_default(tiny_base):
    assert LoopConfig(out="").objective == DEFAULT_OBJECTIVE == "next_token"
    model = load_model(str(tiny_base), dtype="float32").model
    examples = [
        Example(list(range(9, 20)), [False] * 4 + [True] * 7, "one"),
        Example(list(range(40, 46)), [False] + [True] * 5, "two"),
    ]
    total = 0.0
    for example in examples:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example.input_ids])).logits[0].double()
        scores = logits.log_softmax(-1)
        for position, target in enumerate(example.targets):
            if target:
                total -= scores[position - 1, example.input_ids[position]].item()
    found = evaluate_loss(model, examples, 2)
    assert found.targets == 12
    assert found.loss == pytest.approx(total / 12, rel=1e-6)
    assert found == evaluate_loss(model, examples, 2, OBJECTIVES["next_token"])
    recorded = OBJECTIVES["next_token"].evaluation(found)
    assert list(recorded) == ["eval_loss", "perplexity", "eval_target_tokens"]
    assert recorded["perplexity"] == pytest.approx(found.perplexity)
    diverged = OBJECTIVES["next_token"].evaluation(LossResult(1e4, 12))
    assert diverged["perplexity"] == math.inf
