"""What a long command tells whoever called it, so that a terminal can draw it."""

from __future__ import annotations

from dataclasses import dataclass

from graft.train.metrics import Metrics


@dataclass
class Events:
    """Receives notes, progress and metrics; this one ignores them all. Override what you show."""

    def note(self, text: str) -> None:
        """Take a sentence that the user should read."""

    def progress(self, stage: str, done: int, total: int) -> None:
        """Take the progress of a stage, in tensors, layers or rows."""

    def training_begins(self, steps: int, first_step: int) -> None:
        """Take the number of steps, and the first one to be done (later than 1 when resumed)."""

    def metrics(self, metrics: Metrics) -> None:
        """Take the metrics of a step or of an evaluation."""
