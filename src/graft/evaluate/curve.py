"""The picture of what several sizes of a model cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from graft.files.write import replacing
from graft.text import printable

Drawn = tuple[str, float, float | None, float]
"""A model's name, its size in MiB, its perplexity, and the relative error of its weights."""


def plot_curve(points: Sequence[Drawn], beside: Sequence[Drawn], path: Path, title: str) -> None:
    """Draw perplexity, and the error of the weights below, over the size (PNG).

    beside: models that are no part of the curve, such as the original.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    ordered = sorted(points, key=lambda point: point[1])
    measured = [point for point in ordered if point[2] is not None]
    top.plot([size for _, size, _, _ in measured], [value for _, _, value, _ in measured], "o-")
    for number, (name, size, value, _) in enumerate(point for point in beside if point[2]):
        color = ("#555555", "#c8442e")[number % 2]
        top.plot([size], [value], "s", color=color, label=printable(name))
        top.axhline(value or 0.0, color=color, linestyle="--", linewidth=1, zorder=0)
    for name, size, value, _ in measured:
        top.annotate(
            f"{printable(name)}: {value:.4g}",
            (size, value),
            textcoords="offset points",
            xytext=(6, 6),
            fontsize=8,
        )
    top.margins(x=0.15, y=0.15)
    top.set_ylabel("perplexity")
    top.set_title(printable(title), fontsize=9, parse_math=False)
    top.grid(alpha=0.3)
    if any(point[2] for point in beside):
        top.legend()
    bottom.plot([size for _, size, _, _ in ordered], [lost for _, _, _, lost in ordered], "o-")
    bottom.set_ylabel("error of\nthe weights")
    bottom.set_xlabel("weights on disk (MiB)")
    bottom.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
