"""What is watched of a run beside its training: trackers, samples, and drift on general text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from graft.api.events import Events
from graft.api.run.layout import GENERAL, SAMPLES
from graft.api.run.prepare import Prepared
from graft.api.run.report import RunReport
from graft.errors import GraftError
from graft.evaluate.forgetting import (
    Drift,
    Reference,
    measure_drift,
    observe,
    read_reference,
    write_reference,
)
from graft.evaluate.samples import continuations
from graft.files.read import LARGE_JSON_BYTES, passing_damage, read_text
from graft.files.write import write_text
from graft.model.load import LoadedModel
from graft.model.running.memory import give_back_freed
from graft.train.metrics import Metrics
from graft.train.trackers import TRACKERS, Tracker, Watchers

_FEW_TOKENS = 512
"""Of which a forward pass without gradients needs little memory beside any training."""


class Watching:
    """Watches one run; nothing that it does changes a bit of what is trained."""

    def __init__(
        self,
        run: Path,
        prepared: Prepared,
        loaded: LoadedModel,
        events: Events,
        trackers: Sequence[Tracker],
    ) -> None:
        self._run, self._prepared, self._loaded, self._events = run, prepared, loaded, events
        named = [TRACKERS[name].make(run) for name in prepared.config.track]
        self._watchers = Watchers([*trackers, *named], events.note)
        self._reference: Reference | None = None

    def begins(self, anew: bool) -> None:
        """Measure the general text before the first step, or read what was measured then."""
        path = self._run / GENERAL
        try:
            if anew and (windows := self._prepared.watched.general) is not None:
                self._reference = observe(self._loaded.model, windows, self._tokens_at_once())
                write_reference(path, self._reference)
            elif not anew and path.is_file():
                self._reference = read_reference(path)
        except GraftError as error:
            self._events.note(f"drift on general text is not measured: {error}")

    def drift(self) -> Drift | None:
        """Return how far the model has moved on the general text; None where that is not known."""
        if self._reference is None:
            return None
        give_back_freed(self._loaded.model.device)
        try:
            return measure_drift(self._loaded.model, self._reference, self._tokens_at_once())
        except GraftError as error:  # no reason to lose what was trained
            self._events.note(f"drift on general text is not measured: {error}")
            return None

    def metrics(self, metrics: Metrics) -> None:
        """Hand on the metrics of a step or of an evaluation."""
        self._events.metrics(metrics)
        self._watchers.metrics(metrics)

    def evaluated(self, step: int) -> None:
        """Continue the sampled prompts after an evaluation."""
        rows = self._prepared.watched.sampled
        if rows:
            texts = continuations(self._loaded.model, self._loaded.tokenizer, rows)
            write_samples(self._run / SAMPLES, step, texts)
            self._watchers.text(step, texts)

    def ends(self, report: RunReport) -> None:
        """Hand on the report."""
        self._watchers.end(asdict(report))

    def _tokens_at_once(self) -> int:
        """Return as many tokens as a training batch has, which fit into the memory, or few."""
        longest = self._prepared.training.longest
        return max(_FEW_TOKENS, self._prepared.config.batch_size * longest)


def write_samples(path: Path, step: int, texts: Sequence[Mapping[str, str]]) -> None:
    """Add the texts of a step to a file, in the place of those that a killed part wrote of it or
    of later ones."""
    lines = [line for line in _lines(path) if line["step"] < step]
    lines += [{"step": step, **text} for text in texts]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of samples, up to one that is none; none of one that is no text.

    Raises GraftError when it cannot be read for another reason than damage.
    """
    found: list[dict[str, Any]] = []
    text = ""
    with passing_damage():
        text = read_text(path, LARGE_JSON_BYTES)
    for line in text.split("\n"):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(value, dict) or not isinstance(value.get("step"), int):
            break
        found.append(value)
    return found
