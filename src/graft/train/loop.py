"""The training loop."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graft.data.batches import Batch, BatchSampler
from graft.data.encode import Example
from graft.errors import GraftError
from graft.files.write import write_text
from graft.model.running.memory import resident_bytes
from graft.objectives.base import LossResult, Objective
from graft.optimizers.base import OptimizerKind
from graft.train.checkpoint import Position, checkpoints, load_checkpoint, save_checkpoint
from graft.train.config import LoopConfig
from graft.train.health import check_gradients, raise_not_finite
from graft.train.schedule import scheduled_learning_rate

Metrics = dict[str, float]
OnMetrics = Callable[[Metrics], None]
OnBegin = Callable[[int, int], None]
"""Takes the number of steps, and the first to be done: 1, or the one that a run goes on with."""


@dataclass(frozen=True)
class TrainingTask:
    """What the loop works on; nothing in it is read from the configuration."""

    model: PreTrainedModel
    parameters: Mapping[str, nn.Parameter]
    """What trains, by name."""
    examples: Sequence[Example]
    objective: Objective
    evaluate: Callable[[], LossResult]
    """Evaluates the objective on the held-out rows; changes nothing."""
    optimizer: OptimizerKind
    learning_rate: float
    steps: int
    folder: Path
    """Folder of the run, which exists: metrics.jsonl and checkpoints/ go there."""
    rate_factors: Mapping[str, float] = field(default_factory=dict)
    """What multiplies the learning rate of some parameters, by name."""
    before_step: Callable[[int], None] | None = None
    """Called with each step's number, counted from 1, before it begins."""


def steps_to_train(config: LoopConfig, rows: int) -> int:
    """Return the number of optimizer steps; raises GraftError when both or wrong ones are given."""
    if config.steps is not None and config.epochs is not None:
        raise GraftError("steps and epochs are both given; give one of them")
    if config.steps is not None:
        return config.steps
    epochs = 1.0 if config.epochs is None else config.epochs
    return max(1, round(epochs * rows / (config.batch_size * config.grad_accum)))


def train(
    task: TrainingTask,
    config: LoopConfig,
    on_metrics: OnMetrics | None = None,
    on_begin: OnBegin | None = None,
) -> Metrics:
    """Train task.parameters and return the last metrics.

    One step adds up grad_accum batches; its loss is the mean over all the step's targets, so that
    the gradient does not depend on how the rows are cut into batches. Of the next token it is
    L = (sum of -log p over all targets of the step) / (number of those targets).

    With config.resume the last checkpoint is restored and the run goes on bit for bit. Raises
    GraftError when the loss or a gradient is not finite (naming the first module at fault), or
    when something that should train gets no gradient.
    """
    return _Loop(task, config, on_metrics).run(on_begin)


class _Loop:
    def __init__(
        self, task: TrainingTask, config: LoopConfig, on_metrics: OnMetrics | None
    ) -> None:
        self.task, self.config, self.on_metrics = task, config, on_metrics
        self.trained = list(task.parameters.values())
        self.device = self.trained[0].device
        self.optimizer = task.optimizer.make(
            self._groups(), task.learning_rate, config, self.device
        )
        self.sampler = BatchSampler(len(task.examples), config.batch_size, config.seed)
        self.metrics_file = task.folder / "metrics.jsonl"
        self.checkpoint_folder = task.folder / "checkpoints"
        self.last: Metrics = {}

    def _groups(self) -> list[dict[str, Any]]:
        """Return the parameters by what multiplies their learning rate."""
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.task.parameters.items():
            factor = self.task.rate_factors.get(name, 1.0)
            groups.setdefault(factor, []).append(parameter)
        return [{"params": params, "factor": factor} for factor, params in groups.items()]

    def run(self, on_begin: OnBegin | None) -> Metrics:
        done = self._restore() if self.config.resume else 0
        if on_begin is not None:
            on_begin(self.task.steps, done + 1)
        if done == 0:
            self._evaluate(0)
        self.task.model.train()
        for step in range(done + 1, self.task.steps + 1):
            if self.task.before_step is not None:
                self.task.before_step(step)
            self._step(step)
            last = step == self.task.steps
            if last or (self.config.eval_every and step % self.config.eval_every == 0):
                self._evaluate(step)
            if self.config.save_every and (last or step % self.config.save_every == 0):
                self._save(step)
        self.task.model.eval()
        return self.last

    def _step(self, step: int) -> None:
        begin = time.perf_counter()
        rate = scheduled_learning_rate(
            step, self.task.steps, self.task.learning_rate, self.config.warmup_fraction
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        batches = [self._next_batch() for _ in range(self.config.grad_accum)]
        targets = sum(batch.targets for batch in batches)
        loss, sums = 0.0, Metrics()
        for batch in batches:
            batch_loss, measured = self._loss(batch)
            if not torch.isfinite(batch_loss):
                raise_not_finite(self.task.model, partial(self._loss, batch), step)
            (batch_loss / targets).backward()
            loss += batch_loss.item()
            sums = {name: sums.get(name, 0.0) + value for name, value in measured.items()}
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.config.max_grad_norm).item()
        check_gradients(self.task.parameters, norm, step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - begin
        tokens = sum(batch.input_ids.numel() for batch in batches)
        self._record(
            {
                "step": step,
                "loss": loss / targets,
                "learning_rate": rate,
                "grad_norm": norm,
                self.task.objective.counted: targets,
                "step_seconds": seconds,
                "tokens_per_second": tokens / seconds,
                "memory_bytes": resident_bytes(self.device),
                **{name: value / targets for name, value in sums.items()},
            }
        )

    def _next_batch(self) -> Batch:
        return self.task.objective.collate([self.task.examples[row] for row in next(self.sampler)])

    def _loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        return self.task.objective.loss(self.task.model, batch.to(self.device))

    def _evaluate(self, step: int) -> None:
        self.task.model.eval()
        result = self.task.evaluate()
        self.task.model.train()
        self._record({"step": step, **self.task.objective.evaluation(result)})

    def _record(self, metrics: Metrics) -> None:
        self.last = {**self.last, **metrics}
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        if self.on_metrics is not None:
            self.on_metrics(metrics)

    def _save(self, step: int) -> None:
        save_checkpoint(
            self.checkpoint_folder,
            Position(step, self.sampler.state()),
            self.task.parameters,
            self.optimizer,
            self.task.optimizer,
        )

    def _restore(self) -> int:
        """Restore the last checkpoint and forget the metrics after it; return its step."""
        saved = checkpoints(self.checkpoint_folder)
        if not saved:
            raise GraftError(
                f"{self.checkpoint_folder} holds no checkpoint to resume from; train anew, with "
                "--save-every N to have some"
            )
        position = load_checkpoint(
            saved[-1], self.task.parameters, self.optimizer, self.task.optimizer
        )
        self.sampler.restore(position.sampler)
        kept = [
            entry for entry in read_metrics(self.metrics_file) if entry["step"] <= position.step
        ]
        write_text(self.metrics_file, "".join(json.dumps(entry) + "\n" for entry in kept))
        for entry in kept:
            self.last |= entry
        return position.step


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a metrics file; a last line that was cut off is left out."""
    entries = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                break
    return entries
