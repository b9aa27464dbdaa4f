"""A step's gradients are those of its batches' losses over all of its targets, cut to a norm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from graft.data.batches import collate
from graft.data.examples import Example
from graft.objectives.base import LossResult
from graft.objectives.next_token import NEXT_TOKEN
from graft.optimizers.registry import OPTIMIZERS
from graft.train.config import LoopConfig
from graft.train.gradients import FAILED_BATCH, StepGradients
from graft.train.health import NotFiniteError
from graft.train.stop import AbandonedError
from graft.train.task import TrainingTask

ROWS = [[3, 4, 5, 6], [7, 8, 9], [10, 11], [12, 13, 14, 15, 16]]


def step_gradients(folder: Path, max_grad_norm: float = 1e9) -> StepGradients:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    task = TrainingTask(
        model=model,
        parameters=dict(model.named_parameters()),
        examples=[Example(ids, [True] * len(ids), f"row {i}") for i, ids in enumerate(ROWS)],
        objective=NEXT_TOKEN,
        evaluate=lambda: LossResult(1.0, 1),
        optimizer=OPTIMIZERS["adamw"],
        learning_rate=1.0,
        steps=1,
        folder=folder,
    )
    return StepGradients(task, LoopConfig(out=str(folder), max_grad_norm=max_grad_norm))


def test_the_batches_are_summed(tmp_path) -> None:
    step = step_gradients(tmp_path)
    task = step.task
    loss, _ = NEXT_TOKEN.loss(task.model, collate(task.examples))
    wanted = torch.autograd.grad(loss / 10, step.trained)
    added = step.add(1, [[0, 1], [2], [3]])
    assert (added.targets, added.tokens) == (10, 14)
    assert added.loss == pytest.approx(loss.item(), rel=1e-6)
    norm = torch.stack([gradient.norm() for gradient in wanted]).norm()
    assert added.norm == pytest.approx(float(norm), rel=1e-5)
    for parameter, gradient in zip(step.trained, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_the_gradient_is_clipped_and_its_own_norm_told(tmp_path) -> None:
    step = step_gradients(tmp_path, max_grad_norm=0.01)
    added = step.add(1, [[0, 1]])
    clipped = torch.stack([parameter.grad.norm() for parameter in step.trained]).norm()
    assert added.norm > 0.1
    assert float(clipped) == pytest.approx(0.01, rel=1e-3)


def test_the_batch_that_is_not_finite_is_kept_alone(tmp_path) -> None:
    step = step_gradients(tmp_path)
    with torch.no_grad():
        step.task.model.get_input_embeddings().weight[ROWS[2][0]] = torch.nan
    with pytest.raises(NotFiniteError, match=r"model\.embed_tokens.*: row 2$") as failure:
        step.add(1, [[0, 1], [2], [3]])
    assert failure.value.rows == ("row 2",)
    kept = load_file(tmp_path / FAILED_BATCH)
    assert kept["0.input_ids"].tolist() == [ROWS[2]]
    assert set(kept) == {"0.input_ids", "0.labels"}


def test_a_stop_is_heeded_between_two_batches(tmp_path) -> None:
    step = step_gradients(tmp_path)
    step.task.stop.ask()
    step.add(1, [[0]])
    with pytest.raises(AbandonedError):
        step.add(2, [[0], [1]])
