"""The gradients of one step, summed over its batches, and what a step that fails leaves behind."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from graft.data.batches import Batch
from graft.data.examples import Example
from graft.model.running.memory import give_back_freed
from graft.model.save import save_tensors
from graft.train.config import LoopConfig
from graft.train.graphs import GraphedGradients
from graft.train.health import NotFiniteError, check_gradients, raise_not_finite
from graft.train.task import TrainingTask

FAILED_BATCH = "failed-batch.safetensors"


class Added(NamedTuple):
    """What one step's batches came to."""

    loss: float
    """Its sum over all targets."""
    targets: float
    tokens: int
    """Of all rows, padding not counted."""
    norm: float
    """Of the gradient before it is clipped."""
    measured: Mapping[str, float]
    """Sums over all targets of what the objective measures besides."""


class StepGradients:
    """Gives the parameters the gradients of a step, each batch's added to those before."""

    def __init__(self, task: TrainingTask, config: LoopConfig) -> None:
        self.task, self.config = task, config
        self.trained = list(task.parameters.values())
        self.device = self.trained[0].device
        self.graphs: GraphedGradients | None = None
        if config.cuda_graphs:
            given = task.model, task.parameters, task.objective, task.on_note
            self.graphs = GraphedGradients(*given, changes=task.before_step is not None)
        self.largest = 0
        """Tokens of the largest batch so far, padding included."""

    def add(self, step: int, rows: Sequence[Sequence[int]]) -> Added:
        """Add the gradients of sum of losses / sum of targets, and clip them; rows: by batch.

        Raises NotFiniteError when the loss or a gradient is not finite, with the rows at fault in
        failed-batch.safetensors, and what task.stop raises between two batches.
        """
        examples = [[self.task.examples[row] for row in numbers] for numbers in rows]
        batches = [self._batch(some) for some in examples]
        largest = max(batch.input_ids.numel() for batch in batches)
        if largest > self.largest:
            self.largest = largest
            give_back_freed(self.device)
        targets = sum(batch.targets for batch in batches)
        losses, sums = list[Tensor](), dict[str, float]()
        for index, batch in enumerate(batches):
            if index:
                self.task.stop.check()
            batch_loss, measured = self._add(batch, targets)
            losses.append(batch_loss)
            sums = {name: sums.get(name, 0.0) + value for name, value in measured.items()}
        clipped = torch.nn.utils.clip_grad_norm_(self.trained, self.config.max_grad_norm)
        *values, norm = torch.stack([*losses, clipped.float()]).tolist()  # here a GPU is waited for
        for index, value in enumerate(values):
            if not math.isfinite(value):
                with self._keeping(rows[index : index + 1]):
                    raise_not_finite(self.task.model, partial(self._loss, batches[index]), step)
        with self._keeping(rows):
            check_gradients(self.task.parameters, norm, step)
        tokens = sum(len(example.input_ids) for some in examples for example in some)
        return Added(sum(values), targets, tokens, norm, sums)

    def _add(self, batch: Batch, targets: float) -> tuple[Tensor, Mapping[str, float]]:
        """Add the gradients of the batch's loss / targets; return the loss and what is measured."""
        if self.graphs is not None:
            return self.graphs.add(batch, targets), {}
        loss, measured = self._loss(batch)
        (loss / targets).backward()
        return loss.detach(), measured

    def _batch(self, examples: Sequence[Example]) -> Batch:
        objective = self.task.objective
        packs = self.config.batching == "packed"
        return objective.pack(examples) if packs else objective.collate(examples)

    def _loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        return self.task.objective.loss(self.task.model, batch.to(self.device))

    @contextmanager
    def _keeping(self, rows: Sequence[Sequence[int]]) -> Iterator[None]:
        """Write the rows to the run's folder, padded, when the block finds them not finite."""
        try:
            yield
        except NotFiniteError as failure:
            path = self.task.folder / FAILED_BATCH
            tensors = {}
            for number, numbers in enumerate(rows):
                batch = self.task.objective.collate([self.task.examples[row] for row in numbers])
                for one in fields(batch):
                    tensors[f"{number}.{one.name}"] = getattr(batch, one.name)
            save_tensors(tensors, path)
            places = [self.task.examples[row].where for numbers in rows for row in numbers]
            shown = ", ".join(places[:5]) + (" ..." if len(places) > 5 else "")
            raise NotFiniteError(f"{failure}. The batch is in {path}: {shown}", places) from failure
