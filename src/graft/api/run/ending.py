"""How a run ended, and what to do next: words that follow from what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.train.plots import smoothed

_STILL_FALLING = 0.05
"""Share of the whole fall of the held-out loss that its last interval has where it goes on."""
_LEAST_CHANGE = 1e-3
"""Nats by which a loss falls or rises at least, for words to be made of it."""


@dataclass(frozen=True)
class Ending:
    """What is known of a run when its steps are done."""

    run: Path
    history: Sequence[Mapping[str, Any]]
    """The entries of its metrics."""
    steps: int
    """That were planned."""
    done: int
    kept_step: int
    """The step whose parameters are deployed."""
    keep: str
    patience: int | None
    min_improvement: float
    learning_rate: float
    can_go_on: bool
    """Whether there are checkpoints."""

    @property
    def evaluations(self) -> list[tuple[int, float]]:
        """(step, held-out loss) of each evaluation."""
        entries = [entry for entry in self.history if "eval_loss" in entry]
        return [(int(entry["step"]), float(entry["eval_loss"])) for entry in entries]

    @property
    def early(self) -> bool:
        """Whether it ended before its last step."""
        return self.done < self.steps

    @property
    def before(self) -> float:
        """Held-out loss before the first step."""
        return self.evaluations[0][1]

    @property
    def last(self) -> float:
        """Held-out loss after the last step."""
        return self.evaluations[-1][1]

    @property
    def kept_evaluation(self) -> Mapping[str, Any]:
        """The metrics of the evaluation of what is kept."""
        entries = [entry for entry in self.history if "eval_loss" in entry]
        return next(one for one in reversed(entries) if one["step"] == self.kept_step)

    @property
    def first_evaluation(self) -> Mapping[str, Any]:
        """The metrics of the first evaluation, before any step."""
        return next(entry for entry in self.history if "eval_loss" in entry)

    @property
    def loss(self) -> float:
        """Held-out loss of what is kept."""
        return float(self.kept_evaluation["eval_loss"])

    @property
    def worse(self) -> bool:
        """Whether what is kept is worse on held-out rows than before training."""
        return not self.loss <= self.before

    def reason(self) -> str:
        """Return why the run ended."""
        if not self.early:
            return f"all {self.steps:,} steps were done"
        least = f" by more than {self.min_improvement:g}" if self.min_improvement else ""
        return (
            f"stopped early after step {self.done:,} of {self.steps:,}: no improvement{least} in "
            f"{self.patience} evaluations (--patience)"
        )

    def kept(self) -> str:
        """Return which step's parameters are kept, and why."""
        if self.kept_step != self.done:
            return f"step {self.kept_step:,}, the best evaluation of {self._counted()}"
        best = min(self.evaluations[1:], key=lambda one: one[1], default=(self.done, math.nan))
        if best[0] != self.done and self.keep == "last":
            return f"step {self.done:,}, the last; the best evaluation was at step {best[0]:,}"
        return f"step {self.done:,}, the last"

    def next_steps(self) -> list[str]:
        """Return what to do next, most important first; nothing where all went well."""
        found = []
        if self.worse:
            found.append(self._when_worse())
        elif self.last - self.loss > _LEAST_CHANGE:
            found.append(
                f"the held-out loss rose after step {self.kept_step:,} ({self.loss:.4f} → "
                f"{self.last:.4f}): more rows, a lower --learning-rate (it was "
                f"{self.learning_rate:.2g}) or --steps {self.kept_step} may end lower"
            )
        elif self.keep == "last" and self._best_step() != self.done:
            found.append(
                f"the held-out loss was lowest at step {self._best_step():,}; --keep best deploys "
                "that one"
            )
        elif self._still_falling() and self.can_go_on:
            found.append(
                "the held-out loss was still falling; for more of it: graft train --resume --out "
                f"{self.run} --steps {2 * self.steps}"
            )
        if self.early and self.can_go_on and not self.worse:
            found.append(
                f"to go on all the same, with more patience: graft train --resume --out {self.run} "
                f"--patience {2 * (self.patience or 1)}"
            )
        return found

    def _when_worse(self) -> str:
        change = f"{self.before:.4f} → {self.loss:.4f}"
        rate = f"--learning-rate {self.learning_rate / 4:.2g} (it was {self.learning_rate:.2g})"
        if self._training_fell():
            earlier = "" if len(self.evaluations) > 2 else ", with --eval-every to see where"
            return (
                f"the model is worse on held-out rows than before training ({change}) while the "
                f"training loss fell: it learnt its rows by heart; give more rows, fewer --steps"
                f"{earlier}, or {rate}"
            )
        return (
            f"the model is worse on held-out rows than before training ({change}), and the "
            f"training loss did not fall either; try {rate}"
        )

    def _training_fell(self) -> bool:
        losses = smoothed([float(entry["loss"]) for entry in self.history if "loss" in entry])
        return len(losses) > 1 and losses[-1] < losses[0]

    def _still_falling(self) -> bool:
        """Whether the last interval between two evaluations fell as if there were more to come."""
        losses = [loss for _, loss in self.evaluations]
        if len(losses) < 3:
            return False
        fall = losses[-2] - losses[-1]
        return fall > max(_LEAST_CHANGE, _STILL_FALLING * (losses[0] - losses[-1]))

    def _best_step(self) -> int:
        return min(self.evaluations[1:], key=lambda one: one[1], default=(self.done, 0.0))[0]

    def _counted(self) -> str:
        return f"{len(self.evaluations) - 1} after the first step"
