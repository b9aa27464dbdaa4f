"""TensorBoard's event files in a run's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from graft.text import markdown
from graft.train.trackers import Tracker, TrackerKind

FOLDER = "tensorboard"
_FLUSH_SECONDS = 10


class TensorBoardTracker(Tracker):
    """Writes RUN/tensorboard; what a resumed run does again hides what was written of it before."""

    def __init__(self, run: Path) -> None:
        self._folder = run / FOLDER
        self._opened: Any = None

    def on_metrics(self, metrics: Mapping[str, float]) -> None:
        step = int(metrics["step"])
        evaluation = "eval_loss" in metrics
        for name, value in metrics.items():
            if name != "step":
                group = "held out" if evaluation else "training"
                self._writer(step).add_scalar(f"{group}/{name}", value, step)

    def on_text(self, step: int, texts: Sequence[Mapping[str, str]]) -> None:
        for number, text in enumerate(texts, start=1):
            shown = "\n\n".join(f"**{name}**: {markdown(part)}" for name, part in text.items())
            self._writer(step).add_text(f"sample {number}", shown, step)

    def on_end(self, report: Mapping[str, Any]) -> None:
        if self._opened is not None:
            self._opened.close()

    def _writer(self, step: int) -> Any:
        if self._opened is None:
            from torch.utils.tensorboard import SummaryWriter

            self._opened = SummaryWriter(
                str(self._folder), purge_step=step, flush_secs=_FLUSH_SECONDS
            )
        return self._opened


class TensorBoard(TrackerKind):
    """What `--track tensorboard` is."""

    name = "tensorboard"

    def missing(self) -> str | None:
        if find_spec("tensorboard") is None:
            return "it needs tensorboard, not installed here: pip install 'graft-llm[tensorboard]'"
        return None

    def make(self, run: Path) -> Tracker:
        return TensorBoardTracker(run)


TENSORBOARD = TensorBoard()
