"""Accumulating small batches is the step of the large batch: same loss, same gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graft.adapters.registry import METHODS, method_of
from graft.api.checks import format_description
from graft.api.config import TrainConfig
from graft.api.run.reference import with_reference
from graft.data.config import DataConfig
from graft.data.load import load_train_and_eval
from graft.data.shapes.registry import SHAPES
from graft.formats.registry import parse_format
from graft.kernels.backend.native_library import native
from graft.model.load import load_model
from graft.model.targets import freeze_layers, select_targets
from graft.model.trained import what_trains
from graft.objectives.base import LossResult, Objective
from graft.objectives.registry import OBJECTIVES
from graft.optimizers.base import OptimizerKind, OptimizerSettings
from graft.train.config import LoopConfig
from graft.train.loop import train
from graft.train.task import TrainingTask


class Recorder(OptimizerKind):
    """Keeps the gradients of its step and moves nothing."""

    name = "recorder"
    states = ()
    memory_note = "none"

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []

    def make(
        self,
        groups: list[dict[str, Any]],
        learning_rate: float,
        settings: OptimizerSettings,
        device: torch.device,
    ) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(groups, lr=learning_rate)

        def keep(*_: object) -> None:
            for group in optimizer.param_groups:
                self.gradients += [parameter.grad.clone() for parameter in group["params"]]
                for parameter in group["params"]:
                    parameter.grad.zero_()

        optimizer.register_step_pre_hook(keep)
        return optimizer

    def state_bytes(self, numbers: int, size: int) -> int:
        return 0


def step(
    base: Path, rows: Path, folder: Path, name: str, objective: str, size: int
) -> tuple[float, list[Tensor]]:
    """Return the loss and the gradients of one step of 16 rows, `size` of them at once."""
    folder.mkdir()
    config = TrainConfig(model=str(base), data=str(rows), out=str(folder), method=name)
    method = method_of(config)
    description = format_description(config, config.method)
    weight_format = None if description is None else parse_format(description)
    config = config.resolved(None if weight_format is None else weight_format.bits)
    loaded = load_model(str(base), weight_format=weight_format, dtype="float32")
    names = select_targets(loaded.model, ())
    if weight_format is None and method.trains_adapter:
        freeze_layers(loaded.model, names)
    torch.manual_seed(0)
    parameters = method.make_trainable(loaded.model, what_trains(loaded.model, config), config)
    with torch.no_grad():
        for parameter in parameters.values():  # away from a B of zeros, so that A has a gradient
            parameter.add_(torch.randn_like(parameter) * 1e-2)
    minimised = OBJECTIVES[objective]
    data = DataConfig(data=str(_rows_for(minimised, rows)), max_length=48)
    training, _ = load_train_and_eval(data, loaded.tokenizer, 48, 0, holds=minimised.holds)
    training = minimised.arranged(training, 48)
    examples = training.examples
    if minimised.needs_reference:
        examples = with_reference(examples, loaded, 8)
    if minimised.needs_teacher:
        minimised = minimised.taught(load_model(str(base), dtype="float32").model)
    recorder = Recorder()
    task = TrainingTask(
        model=loaded.model,
        parameters=parameters,
        examples=examples,
        objective=minimised,
        evaluate=lambda: LossResult(1.0, 1),
        optimizer=recorder,
        learning_rate=1.0,
        steps=1,
        folder=folder,
    )
    loop = LoopConfig(out=str(folder), batch_size=size, grad_accum=16 // size, max_grad_norm=1e9)
    return train(task, loop).last["loss"], recorder.gradients


def _rows_for(objective: Objective, rows: Path) -> Path:
    """Rows that an objective takes, made of those of prompts and completions."""
    if objective.takes(SHAPES["prompt"]):
        return rows
    found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    path = rows.with_name("pairs.jsonl")
    lines = [
        json.dumps(
            {
                "prompt": one["prompt"],
                "chosen": one["completion"],
                "rejected": other["completion"] + "!",
            }
        )
        for one, other in zip(found, found[1:] + found[:1], strict=True)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if OBJECTIVES[name].adds_up])
@pytest.mark.parametrize("method", list(METHODS))
def test_two_halves_are_the_whole(
    method, objective, tiny_base, rows, tmp_path, monkeypatch
) -> None:
    # What is rounded is rounded by the batch: qalora's gradient is taken in floats here.
    monkeypatch.delitem(native.operations, "grad_factors", raising=False)
    whole, gradients = step(tiny_base, rows, tmp_path / "whole", method, objective, 16)
    halves, summed = step(tiny_base, rows, tmp_path / "halves", method, objective, 8)
    assert halves == pytest.approx(whole, rel=1e-6)
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    for one, other in zip(gradients, summed, strict=True):
        assert one.any()
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5 * largest)
