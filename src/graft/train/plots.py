"""The picture of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graft.errors import GraftError
from graft.files.write import replacing
from graft.text import printable

_MARGIN = "reward_margin"


def plot_loss(
    metrics: Sequence[dict[str, Any]],
    path: Path,
    title: str,
    kept: int | None = None,
    unit: str = "nats per target token",
) -> None:
    """Draw training and held-out loss, and the learning rate below, over the steps (PNG).

    Between the two is the margin of the rewards, where it was measured. kept: the step whose
    parameters are kept, which is marked where it was evaluated. unit: of what losses are means.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [entry for entry in metrics if "loss" in entry]
    evaluations = [entry for entry in metrics if "eval_loss" in entry]
    if not steps:
        raise GraftError(f"there are no training steps to plot in {path.parent.parent}")
    judged = any(_MARGIN in entry for entry in steps)
    figure = Figure(figsize=(8, 7.2 if judged else 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    heights = (4, 2, 1) if judged else (4, 1)
    top, *middle, bottom = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    x = [entry["step"] for entry in steps]
    losses = [entry["loss"] for entry in steps]
    top.plot(x, losses, color="#9bbbd8", linewidth=1, label="training, each step")
    top.plot(x, smoothed(losses), color="#1f5f99", linewidth=2, label="training, smoothed")
    top.plot(
        [entry["step"] for entry in evaluations],
        [entry["eval_loss"] for entry in evaluations],
        "o-",
        color="#c8442e",
        label="held out",
    )
    marked = [entry for entry in evaluations if entry["step"] == kept]
    for entry in marked[:1]:
        for axes in (top, *middle, bottom):
            axes.axvline(entry["step"], color="#3b7d3b", linestyle="--", linewidth=1, zorder=0)
        top.plot(
            entry["step"],
            entry["eval_loss"],
            "o",
            color="#3b7d3b",
            markersize=10,
            markerfacecolor="none",
            markeredgewidth=2,
            label=f"kept: step {entry['step']:,}",
        )
    for entry in evaluations:
        top.annotate(
            f"{entry['eval_loss']:.3f}",
            (entry["step"], entry["eval_loss"]),
            textcoords="offset points",
            xytext=(0, 9),
            ha="center",
            fontsize=8,
            color="#c8442e",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    top.margins(y=0.1)  # room for the figure above the first point
    top.set_ylabel(f"loss ({unit})")
    # Dollars in a name are no formula.
    top.set_title(printable(title), parse_math=False)
    top.grid(alpha=0.3)
    top.legend()
    for axes in middle:
        _draw_margin(axes, steps, evaluations)
    bottom.plot(x, [entry["learning_rate"] for entry in steps], color="#555555")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    bottom.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _draw_margin(
    axes: Any, steps: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]
) -> None:
    """Draw the margin between the rewards of the answers that are chosen and of the others."""
    seen = [(entry["step"], entry[_MARGIN]) for entry in steps if _MARGIN in entry]
    x, margins = [step for step, _ in seen], [margin for _, margin in seen]
    axes.plot(x, margins, color="#9bbbd8", linewidth=1)
    axes.plot(x, smoothed(margins), color="#1f5f99", linewidth=2)
    told = [entry for entry in evaluations if f"eval_{_MARGIN}" in entry]
    axes.plot(
        [entry["step"] for entry in told],
        [entry[f"eval_{_MARGIN}"] for entry in told],
        "o-",
        color="#c8442e",
    )
    axes.axhline(0, color="#555555", linewidth=0.8)
    axes.set_ylabel("reward margin")
    axes.grid(alpha=0.3)


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Return the exponential moving average, corrected for its start."""
    average, smoothed = 0.0, []
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**count))
    return smoothed
