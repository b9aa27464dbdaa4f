"""The picture of what several sizes of a model cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

from graft.files.write import replacing
from graft.text import printable

Drawn = tuple[str, float, float | None, float]
"""A model's name, its size in MiB, its perplexity, and the relative error of its weights."""


def plot_curve(
    curves: Mapping[str, Sequence[Drawn]], beside: Sequence[Drawn], path: Path, title: str
) -> None:
    """Draw perplexity, and the error of the weights below, over the size (PNG).

    curves: by what the legend calls them. beside: models that are no part of one, such as the
    original. Where no perplexity was measured there is the error alone.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for number, (label, points) in enumerate(curves.items()):
        ordered = sorted(points, key=lambda point: point[1])
        sizes = [size for _, size, value, _ in ordered if value is not None]
        values = [value for _, _, value, _ in ordered if value is not None]
        (line,) = top.plot(sizes, values, "o-", label=printable(label))
        bottom.plot([size for _, size, _, _ in ordered], [lost for *_, lost in ordered], "o-")
        for name, size, value, _ in ordered:
            if value is not None:
                top.annotate(
                    f"{printable(name)}: {value:.4g}",
                    (size, value),
                    textcoords="offset points",
                    xytext=(6, -12 if number % 2 else 6),
                    fontsize=8,
                    color=line.get_color(),
                )
    for number, (name, size, value, _) in enumerate(beside):
        if value is not None:
            color = ("#555555", "#c8442e")[number % 2]
            top.plot([size], [value], "s", color=color, label=f"{printable(name)}: {value:.4g}")
            top.axhline(value, color=color, linestyle="--", linewidth=1, zorder=0)
    top.margins(x=0.15, y=0.15)
    top.set_ylabel("perplexity")
    top.set_title(fill(printable(title), 100), fontsize=9, parse_math=False)
    top.grid(alpha=0.3)
    top.legend()
    bottom.set_ylabel("error of\nthe weights")
    bottom.set_xlabel("weights on disk (MiB)")
    bottom.grid(alpha=0.3)
    if all(value is None for points in (*curves.values(), beside) for *_, value, _ in points):
        top.remove()
        bottom.set_subplotspec(figure.add_gridspec()[0])
        bottom.set_title(top.get_title(), fontsize=9, parse_math=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
