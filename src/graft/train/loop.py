"""The training loop."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from graft.data.sampler import make_sampler
from graft.files.write import flush, unwritable, write_text
from graft.model.running.memory import give_back_freed, resident_bytes
from graft.train.best import BEST, BestParameters
from graft.train.checkpoint import (
    Position,
    checkpoint_steps,
    keep_newest,
    kept_metrics,
    load_checkpoint,
    note_evaluation,
    random_state,
    read_position,
    save_checkpoint,
)
from graft.train.config import LoopConfig
from graft.train.gates import Gates
from graft.train.gradients import StepGradients
from graft.train.metrics import Metrics
from graft.train.schedule import passes, scheduled_learning_rate, steps_between_evaluations
from graft.train.stop import AbandonedError, StoppedError
from graft.train.task import TrainingTask

OnMetrics = Callable[[Metrics], None]
OnBegin = Callable[[int, int], None]
"""Takes the number of steps, and the first to be done: 1, or the one that a run goes on with."""

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Trained:
    """How a training ended; the model has the parameters that are kept."""

    last: Metrics
    """The last metrics of each name."""
    step: int
    """Steps done: fewer than planned where patience ended."""
    kept_step: int
    """The step that the parameters are of."""


def train(
    task: TrainingTask,
    config: LoopConfig,
    on_metrics: OnMetrics | None = None,
    on_begin: OnBegin | None = None,
) -> Trained:
    """Train task.parameters, and return how it ended with those that the configuration keeps.

    One step adds up grad_accum batches; its loss is the mean over all the step's targets, so that
    the gradient does not depend on how the rows are cut into batches. Of the next token it is
    L = (sum of -log p over all targets of the step) / (number of those targets).

    From task.checkpoint it goes on bit for bit. Writes metrics.jsonl and, as the configuration
    says, checkpoints. Raises StoppedError when task.stop was asked, with a checkpoint of the last
    whole step; NotFiniteError when the loss or a gradient is not finite (naming the first module at
    fault), with the batch in failed-batch.safetensors; and GraftError when something that should
    train gets no gradient, when training changes no output, or when the checkpoint does not fit.
    """
    return _Loop(task, config, on_metrics).run(on_begin)


class _Moment(NamedTuple):
    """What a checkpoint holds besides what trains, which stays as it is until the next step."""

    step: int
    sampler: dict[str, int]
    random: dict[str, Tensor]


class _Loop:
    def __init__(
        self, task: TrainingTask, config: LoopConfig, on_metrics: OnMetrics | None
    ) -> None:
        self.task, self.config, self.on_metrics = task, config, on_metrics
        self.device = next(iter(task.parameters.values())).device
        self.optimizer = task.optimizer.make(
            self._groups(), task.learning_rate, config, self.device
        )
        self.sampler = make_sampler(config.batching, task.examples, config.batch_size, config.seed)
        self.metrics_file = task.folder / "metrics.jsonl"
        self.interval = steps_between_evaluations(config, len(task.examples))
        self.best = BestParameters(
            task.folder / BEST,
            task.parameters,
            writes=config.keep == "best",
            first=task.first_kept,
            patience=config.patience,
            min_improvement=config.min_improvement,
        )
        self.gates = Gates(
            task.model,
            task.parameters,
            task.examples[0],
            task.steps,
            config.warmup_fraction,
            task.on_note,
        )
        self.gradients = StepGradients(task, config)
        self.last: Metrics = {}
        self.evaluated = -1
        """The step after which the last evaluation was made."""
        self.saved, self.saved_at = 0, time.monotonic()
        self.moment = self._now(0)

    def _groups(self) -> list[dict[str, Any]]:
        """Return the parameters by what multiplies their learning rate."""
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.task.parameters.items():
            factor = self.task.rate_factors.get(name, 1.0)
            groups.setdefault(factor, []).append(parameter)
        return [{"params": params, "factor": factor} for factor, params in groups.items()]

    def run(self, on_begin: OnBegin | None) -> Trained:
        if self.task.checkpoint is None:
            self.best.restore(None, 0)
        else:
            self._restore(self.task.checkpoint)
        if on_begin is not None:
            on_begin(self.task.steps, self.moment.step + 1)
        with self.task.stop.heeding():
            try:
                self._steps()
            except AbandonedError:
                raise self._stopped() from None
        self.task.model.eval()
        done = self.moment.step
        return Trained(self.last, done, self.best.recall(done))

    def _steps(self) -> None:
        self._evaluate_if_due()
        self.task.model.train()
        for step in range(self.moment.step + 1, self.task.steps + 1):
            if self.best.exhausted:
                break
            if self.task.before_step is not None:
                self.task.before_step(step)
            self._step(step)
            self.moment = self._now(step)
            self.gates.outputs(step)
            self.task.stop.check()
            self._evaluate_if_due()
            self._save_if_due()
        self._save_if_due()  # where there was no step left

    def _now(self, step: int) -> _Moment:
        return _Moment(step, self.sampler.state(), random_state())

    def _step(self, step: int) -> None:
        begin = time.perf_counter()
        rate = scheduled_learning_rate(
            step, self.task.steps, self.task.learning_rate, self.config.warmup_fraction
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        rows = [next(self.sampler) for _ in range(self.config.grad_accum)]
        added = self.gradients.add(step, rows)
        self.gates.gradients(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - begin
        self._record(
            {
                "step": step,
                "loss": added.loss / added.targets,
                "learning_rate": rate,
                "grad_norm": added.norm,
                self.task.objective.counted: added.targets,
                "step_seconds": seconds,
                "tokens_per_second": added.tokens / seconds,
                "memory_bytes": resident_bytes(self.device),
                **self.task.objective.measured(
                    {name: value / added.targets for name, value in added.measured.items()}
                ),
            }
        )

    def _evaluate_if_due(self) -> None:
        step = self.moment.step
        due = step in (0, self.task.steps) or passes(self.interval, step)
        if not due or self.evaluated == step:
            return
        self.task.model.eval()
        give_back_freed(self.device)
        result = self.task.evaluate()
        self.task.model.train()
        metrics = self.task.objective.evaluation(result)
        self._record({"step": step, **metrics})
        self.evaluated = step
        self.best.evaluated(step, metrics["eval_loss"], last=step == self.task.steps)
        if step and step == self.saved:  # a stop came first: its checkpoint knows nothing of it
            flush(self.metrics_file)
            note_evaluation(self.task.folder / CHECKPOINTS, self._position())
        self.best.sweep(checkpoint_steps(self.task.folder / CHECKPOINTS))
        if self.task.on_evaluated is not None:
            self.task.on_evaluated(step)

    def _record(self, metrics: Metrics) -> None:
        self.last = {**self.last, **metrics}
        try:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
        except OSError as error:
            raise unwritable(self.metrics_file, error) from error
        if self.on_metrics is not None:
            self.on_metrics(metrics)

    def _save_if_due(self) -> None:
        step, every = self.moment.step, self.config.save_every
        due = step == self.task.steps or (every is not None and step % every == 0)
        due = due or self.best.exhausted
        late = time.monotonic() - self.saved_at >= 60 * self.config.save_minutes
        if self.config.checkpoints and (due or late):
            self._save()

    def _save(self) -> None:
        step = self.moment.step
        if step == self.saved:
            return
        flush(self.metrics_file)  # which the checkpoint goes on from
        save_checkpoint(
            self.task.folder / CHECKPOINTS,
            self._position(),
            self.moment.random,
            self.task.parameters,
            self.optimizer,
            self.task.optimizer,
        )
        self.best.sweep(checkpoint_steps(self.task.folder / CHECKPOINTS))
        self.saved, self.saved_at = step, time.monotonic()
        if self.task.on_saved is not None:
            self.task.on_saved(step)

    def _position(self) -> Position:
        step, sampler, _ = self.moment
        return Position(step, sampler, self.last, self.best.state, self.evaluated)

    def _stopped(self) -> StoppedError:
        """Write a checkpoint of the last whole step; return what to raise."""
        step = self.moment.step
        if step == 0:
            return StoppedError("stopped before the end of the first step", step)
        self._save()
        path = self.task.folder / CHECKPOINTS
        return StoppedError(
            f"stopped after step {step} of {self.task.steps}, with a checkpoint in {path}", step
        )

    def _restore(self, checkpoint: Path) -> None:
        """Restore a checkpoint and forget the metrics after it."""
        position = read_position(checkpoint)
        self.sampler.restore(position.sampler)
        load_checkpoint(checkpoint, self.task.parameters, self.optimizer, self.task.optimizer)
        kept = kept_metrics(self.metrics_file, position, self.task.on_note)
        write_text(self.metrics_file, "".join(json.dumps(entry) + "\n" for entry in kept))
        for entry in kept:
            self.last |= entry
            if "loss" not in entry:
                self.evaluated = entry["step"]
        if position.evaluated is not None:  # whatever the lines have lost
            self.evaluated = position.evaluated
        self.last |= position.metrics
        self.saved = position.step
        lost = self.best.restore(position.best, position.step, position.step == self.task.steps)
        if lost is not None:
            self.task.on_note(lost)
        keep_newest(checkpoint)  # a kill may have come before what was no longer needed had gone
        self.best.sweep(checkpoint_steps(checkpoint.parent))
        self.moment = self._now(position.step)
