"""Forward and backward as a CUDA graph for each shape of a batch: one launch in place of thousands.

Not yet measured on a GPU, and off unless `--cuda-graphs` asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graft.data.batches import IGNORED, Batch
from graft.errors import GraftError
from graft.kernels.low_rank.triton import casts
from graft.model.internals import attention_of
from graft.model.running.attention import NAME
from graft.objectives.base import Objective

ROUNDING = 64
"""Rows are padded to a multiple of so many tokens, so that few shapes come."""
MOST = 16
"""Shapes that are recorded; batches of any other are computed as they come."""

T = TypeVar("T")
Gradients = list[Tensor | None]


class Recorder(Protocol):
    """Records what a function launches."""

    def __call__(self, run: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Return the function's result, and what computes it anew in the same memory."""


class CudaGraphs:
    """Records CUDA graphs that share their memory: one is replayed at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Record a graph. It holds no numbers before it is first replayed."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = run()
        self._pool = graph.pool()
        return result, graph.replay


class _Graph(NamedTuple):
    ids: Tensor
    labels: Tensor
    targets: Tensor
    loss: Tensor
    gradients: Gradients
    replay: Callable[[], None]
    addresses: Sequence[int]
    """Of the parameters that it reads."""


class GraphedGradients:
    """Adds the gradients of batches to those of the parameters, by a graph from the second on.

    The first batch of a shape is computed as it comes, which compiles what its graph launches.
    Raises GraftError where no graph can be recorded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        parameters: Mapping[str, nn.Parameter],
        objective: Objective,
        note: Callable[[str], None],
        changes: bool = False,
        record: Recorder | None = None,
    ) -> None:
        """changes: layers are replaced between two steps; record: by default, CUDA's graphs."""
        self._model, self._parameters = model, list(parameters.values())
        _check(model, objective, changes)
        self._loss = objective.fixed_loss
        self._note: Callable[[str], None] | None = note
        self._record = record or recorder(self._parameters[0].device)
        self._seen: set[torch.Size] = set()
        self._graphs: dict[torch.Size, _Graph] = {}
        self._lent: Gradients = []
        """The gradients of a graph that the parameters hold as theirs."""

    def add(self, batch: Batch, targets: float) -> Tensor:
        """Add the gradients of the batch's loss / targets; return the loss, on the device."""
        device = self._parameters[0].device
        ids, labels = _padded(batch, device)
        if ids.shape in self._seen:
            return self._replayed(ids, labels, targets)
        if len(self._seen) < MOST:
            self._seen.add(ids.shape)
        elif self._note is not None:
            self._note(
                f"--cuda-graphs: {MOST} shapes of batches have graphs; one of {list(ids.shape)} "
                "and any other are computed without"
            )
            self._note = None
        loss, gradients = self._computed(ids, labels, _scalar(targets, device))
        self._add(gradients)
        return loss

    def _replayed(self, ids: Tensor, labels: Tensor, targets: float) -> Tensor:
        graph = self._graphs.get(ids.shape)
        if graph is None or graph.addresses != self._addresses():
            graph = self._graphs[ids.shape] = self._recorded(ids, labels, targets)
        graph.ids.copy_(ids)
        graph.labels.copy_(labels)
        graph.targets.fill_(targets)
        self._take_back()
        casts.refresh()
        graph.replay()
        self._add(graph.gradients)
        self._lent = graph.gradients
        return graph.loss.clone()

    def _recorded(self, ids: Tensor, labels: Tensor, targets: float) -> _Graph:
        ids, labels, count = ids.clone(), labels.clone(), _scalar(targets, ids.device)
        casts.refresh()  # so that no copy is part of the graph
        (loss, gradients), replay = self._record(lambda: self._computed(ids, labels, count))
        return _Graph(ids, labels, count, loss, gradients, replay, self._addresses())

    def _computed(self, ids: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Gradients]:
        loss = self._loss(self._model, ids, labels)
        gradients = torch.autograd.grad(loss / targets, self._parameters, allow_unused=True)
        return loss.detach(), list(gradients)

    def _addresses(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self._parameters]

    def _take_back(self) -> None:
        """Let the parameters hold copies of what a graph has lent them: the next one overwrites it.

        All graphs share their memory, so that is so of any of them.
        """
        pairs = zip(self._parameters, self._lent, strict=bool(self._lent))
        held = [one for one, gradient in pairs if gradient is not None and one.grad is gradient]
        self._lent = []
        if held:
            copies = torch._foreach_mul([one.grad for one in held if one.grad is not None], 1.0)
            for parameter, copy in zip(held, copies, strict=True):
                parameter.grad = copy

    def _add(self, gradients: Gradients) -> None:
        sums, terms = [], []
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                sums.append(parameter.grad)
                terms.append(gradient)
        if sums:
            torch._foreach_add_(sums, terms)


def _scalar(value: float, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=torch.float32, device=device)


def _padded(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and labels on the device, padded to a multiple of `ROUNDING` tokens."""
    more = -batch.input_ids.shape[1] % ROUNDING
    pairs = ((batch.input_ids, 0), (batch.labels, IGNORED))
    ids, labels = (nn.functional.pad(tensor, (0, more), value=fill) for tensor, fill in pairs)
    return ids.to(device), labels.to(device)


def recorder(device: torch.device) -> Recorder:
    """Return what records on a device; raises GraftError where nothing does."""
    if device.type != "cuda":
        raise GraftError(f"--cuda-graphs: the model is on {device}; train without --cuda-graphs")
    return CudaGraphs()


def _check(model: PreTrainedModel, objective: Objective, changes: bool) -> None:
    """Raise GraftError where no graph can be recorded of a training."""
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    recomputes = any(getattr(one, "gradient_checkpointing", False) for one in model.modules())
    kind = type(model).__name__
    reasons = {
        f"the objective {objective.name} asks for numbers on the way": not objective.has_fixed_loss,
        "this method changes its layers between steps": changes,
        "recomputed layers read the state of random numbers (--checkpointing none)": recomputes,
        f"{kind} does not leave its attention to graft": attention_of(model) != NAME,
        f"a window of {window} tokens needs a mask of each batch": window is not None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise GraftError(f"--cuda-graphs: {reason}; train without --cuda-graphs")
