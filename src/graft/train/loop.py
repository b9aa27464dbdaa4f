"""The training loop."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graft.data.batches import IGNORED, Batch, BatchSampler, collate
from graft.data.encode import Example
from graft.errors import GraftError
from graft.files import write_text
from graft.model.running.loss import target_loss
from graft.model.running.memory import resident_bytes
from graft.train.checkpoint import Position, checkpoints, load_checkpoint, save_checkpoint
from graft.train.config import LoopConfig
from graft.train.health import check_gradients, raise_not_finite
from graft.train.schedule import scheduled_learning_rate

Metrics = dict[str, float | int]
Evaluate = Callable[[], tuple[float, int]]
"""Returns (mean loss per target in nats, targets) on the held-out rows; changes nothing."""
OnMetrics = Callable[[Metrics], None]


@dataclass(frozen=True)
class TrainingTask:
    """What the loop works on; nothing in it is read from the configuration."""

    model: PreTrainedModel
    parameters: Mapping[str, nn.Parameter]
    """What trains, by name."""
    examples: Sequence[Example]
    evaluate: Evaluate
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


def train(task: TrainingTask, config: LoopConfig, on_metrics: OnMetrics | None = None) -> Metrics:
    """Train task.parameters and return the last metrics.

    One step adds up grad_accum batches; its loss is the mean over all the step's target tokens, so
    that the gradient does not hang on how the rows are cut into batches:
    L = (sum of -log p over all targets of the step) / (number of those targets).

    With config.resume the last checkpoint is restored and the run goes on bit for bit. Raises
    GraftError when the loss or a gradient is not finite (naming the first module at fault), or
    when something that should train gets no gradient.
    """
    return _Loop(task, config, on_metrics).run()


class _Loop:
    def __init__(
        self, task: TrainingTask, config: LoopConfig, on_metrics: OnMetrics | None
    ) -> None:
        self.task, self.config, self.on_metrics = task, config, on_metrics
        self.trained = list(task.parameters.values())
        self.device = self.trained[0].device
        self.optimizer = torch.optim.AdamW(
            self._groups(),
            lr=task.learning_rate,
            weight_decay=config.weight_decay,
            # Gradients are scaled to max_grad_norm, and what keeps from dividing by 0 with them.
            eps=1e-8 * min(1.0, config.max_grad_norm),
            # One kernel per tensor instead of ten, and no temporaries.
            fused=self.device.type in ("cpu", "cuda"),
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

    def run(self) -> Metrics:
        first = self._restore() if self.config.resume else 0
        if first == 0:
            self._evaluate(0)
        self.task.model.train()
        for step in range(first + 1, self.task.steps + 1):
            if self.task.before_step is not None:
                self.task.before_step(step)
            self._step(step)
            last = step == self.task.steps
            if last or (self.config.eval_every and step % self.config.eval_every == 0):
                self._evaluate(step)
            if self.config.save_every and (last or step % self.config.save_every == 0):
                position = Position(step, self.sampler.state())
                save_checkpoint(
                    self.checkpoint_folder, position, self.task.parameters, self.optimizer
                )
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
        targets = sum(int((batch.labels[:, 1:] != IGNORED).sum()) for batch in batches)
        loss = 0.0
        for batch in batches:
            batch_loss = self._loss(batch)
            if not torch.isfinite(batch_loss):
                raise_not_finite(self.task.model, batch.input_ids.to(self.device), step)
            (batch_loss / targets).backward()
            loss += batch_loss.item()
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
                "target_tokens": targets,
                "step_seconds": seconds,
                "tokens_per_second": tokens / seconds,
                "memory_bytes": resident_bytes(self.device),
            }
        )

    def _next_batch(self) -> Batch:
        return collate([self.task.examples[row] for row in next(self.sampler)])

    def _loss(self, batch: Batch) -> Tensor:
        ids, labels = batch.input_ids.to(self.device), batch.labels.to(self.device)
        return target_loss(self.task.model, ids, labels)[0]

    def _evaluate(self, step: int) -> None:
        self.task.model.eval()
        loss, targets = self.task.evaluate()
        self.task.model.train()
        perplexity = torch.tensor(loss, dtype=torch.float64).exp().item()
        self._record(
            {
                "step": step,
                "eval_loss": loss,
                "perplexity": perplexity,
                "eval_target_tokens": targets,
            }
        )

    def _record(self, metrics: Metrics) -> None:
        self.last = {**self.last, **metrics}
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        if self.on_metrics is not None:
            self.on_metrics(metrics)

    def _restore(self) -> int:
        """Restore the last checkpoint and forget the metrics after it; return its step."""
        there = checkpoints(self.checkpoint_folder)
        if not there:
            raise GraftError(
                f"{self.checkpoint_folder} holds no checkpoint to resume from; train anew, with "
                "--save-every N to have some"
            )
        position = load_checkpoint(there[-1], self.task.parameters, self.optimizer)
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
