"""Progress in the terminal: a bar where there is one, a line now and then where there is none."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from graft.api.events import Events
from graft.text import printable
from graft.train.metrics import Metrics

_SECONDS_BETWEEN_LINES = 10.0


class TerminalEvents(Events):
    """Draws the events of a command on stderr; use it as a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[info]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.tasks: dict[str, TaskID] = {}
        self.steps = 0
        self.last_line = time.monotonic()

    def __enter__(self) -> TerminalEvents:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def note(self, text: str) -> None:
        """Print a sentence above the bars."""
        self.console.print(printable(text), highlight=False, markup=False, soft_wrap=True)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Move the stage's bar; remove it when the stage is done."""
        if stage not in self.tasks:
            self.tasks[stage] = self.bar.add_task(printable(stage), total=total, info="")
        self.bar.update(self.tasks[stage], completed=done, total=total)
        if done == total:
            self.bar.remove_task(self.tasks.pop(stage))

    def training_begins(self, steps: int, first_step: int) -> None:
        """Begin the training bar."""
        self.steps = steps
        if "training" in self.tasks:  # one that failed
            self.bar.remove_task(self.tasks.pop("training"))
        self.tasks["training"] = self.bar.add_task(
            "training", total=steps, completed=first_step - 1, info=""
        )

    def metrics(self, metrics: Metrics) -> None:
        """Move the training bar; print each evaluation."""
        step = int(metrics["step"])
        if "eval_loss" in metrics:
            also = f", perplexity {metrics['perplexity']:.4f}" if "perplexity" in metrics else ""
            self.note(f"step {step}: held-out loss {metrics['eval_loss']:.4f}{also}")
        if "loss" not in metrics:
            return
        info = f"loss {metrics['loss']:.4f}, {metrics['tokens_per_second']:,.0f} tokens/s"
        self.bar.update(self.tasks["training"], completed=step, info=info)
        if step == self.steps:
            self.bar.remove_task(self.tasks.pop("training"))
        now = time.monotonic()
        if not self.console.is_terminal and now - self.last_line > _SECONDS_BETWEEN_LINES:
            self.last_line = now
            self.note(f"step {step} of {self.steps}: {info}")


def progress() -> TerminalEvents:
    """Return events that are drawn on stderr, so that stdout holds the result alone."""
    return TerminalEvents(Console(stderr=True))
