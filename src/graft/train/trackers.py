"""Trackers: whoever watches a run beside the terminal; none of them can end it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from graft.entries import Entries, Listed
from graft.text import printable

_SHOWN = 300


class Tracker:
    """Watches a run. Override what is wanted; these methods do nothing."""

    def on_metrics(self, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a step or of an evaluation, with its `step`."""

    def on_text(self, step: int, texts: Sequence[Mapping[str, str]]) -> None:
        """Take what the model says at a step: each with `prompt`, `text` and `reference`."""

    def on_end(self, report: Mapping[str, Any]) -> None:
        """Take the run's report, as report.json has it."""


class TrackerKind:
    """An entry of `TRACKERS`: how a tracker is made that is asked for by name."""

    name: str

    def missing(self) -> str | None:
        """Return what has to be installed first, or None."""
        return None

    def make(self, run: Path) -> Tracker:
        """Return a tracker of the run in a folder; it may keep files there under its own name."""
        raise NotImplementedError


TRACKERS: Entries[TrackerKind] = Entries(
    "tracker",
    {
        "tensorboard": Listed(
            "graft.train.tensorboard:TENSORBOARD", "TensorBoard's files, in the run's folder"
        ),
    },
)


class Watchers:
    """Tells several trackers; one that fails is told of once and then left out."""

    def __init__(self, trackers: Sequence[Tracker], note: Callable[[str], None]) -> None:
        self._live = list(trackers)
        self._note = note

    def metrics(self, metrics: Mapping[str, float]) -> None:
        """Hand metrics on."""
        self._tell(lambda tracker: tracker.on_metrics(metrics))

    def text(self, step: int, texts: Sequence[Mapping[str, str]]) -> None:
        """Hand generated texts on."""
        self._tell(lambda tracker: tracker.on_text(step, texts))

    def end(self, report: Mapping[str, Any]) -> None:
        """Hand the report on."""
        self._tell(lambda tracker: tracker.on_end(report))

    def _tell(self, tell: Callable[[Tracker], None]) -> None:
        for tracker in tuple(self._live):
            try:
                tell(tracker)
            except Exception as error:  # it is another's code, or another's service: anything
                self._live.remove(tracker)
                reason = printable(f"{type(error).__name__}: {error}")[:_SHOWN]
                self._note(
                    f"the tracker {type(tracker).__name__} failed ({reason}); the run goes on "
                    "without it, and metrics.jsonl has everything"
                )
