"""What a training works on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from graft.data.examples import Example
from graft.objectives.base import LossResult, Objective
from graft.optimizers.base import OptimizerKind
from graft.train.stop import Stop


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
    first_kept: int = 1
    """The first step whose parameters may be deployed."""
    on_evaluated: Callable[[int], None] | None = None
    """Called with the number of steps done after an evaluation; changes nothing."""
    on_note: Callable[[str], None] = lambda text: None
    """Takes sentences that the user should read."""
    checkpoint: Path | None = None
    """What to go on from; None begins at the first step."""
    on_saved: Callable[[int], None] | None = None
    """Called with the number of steps done when a checkpoint has been written."""
    stop: Stop = field(default_factory=Stop)
    """Asks for an early end; `evaluate` and `before_step` may check it too, and raise what its
    check raises."""
