"""Pictures of adapters: the error at each rank, singular values by layer, two side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graft.files.write import replacing
from graft.text import printable

_BLUE, _RED = "#1f5f99", "#c8442e"


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def plot_curve(points: Sequence[Mapping[str, float | int | None]], path: Path, title: str) -> None:
    """Draw the relative error over the rank, and over the parameters of both kinds of cuts (PNG).

    points: see `graft.api.adapter.files.curve`.
    """
    figure = _figure(10, 4)
    left, right = figure.subplots(1, 2, sharey=True)
    by_rank = [point for point in points if point["rank"] is not None]
    by_energy = [point for point in points if point["energy"] is not None]
    errors = [point["relative_error"] for point in by_rank]
    left.plot([point["rank"] for point in by_rank], errors, "o-", color=_BLUE)
    left.set_xscale("log", base=2)
    left.set_xlabel("rank of every layer")
    left.set_ylabel("relative error of the update")
    for label, chosen, colour in (
        ("one rank for all layers", by_rank, _BLUE),
        ("each layer's rank by its energy", by_energy, _RED),
    ):
        sizes = [point["parameters"] for point in chosen]
        right.plot(
            sizes, [point["relative_error"] for point in chosen], "o-", color=colour, label=label
        )
    for point in by_energy:
        place = point["parameters"], point["relative_error"]
        text = f"{point['energy']:g}"
        right.annotate(text, place, textcoords="offset points", xytext=(5, 4), fontsize=7)
    right.set_xscale("log")
    right.set_xlabel("parameters of the adapter")
    right.legend()
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.suptitle(printable(title), parse_math=False)
    _save(figure, path)


def plot_spectra(spectra: Mapping[str, Sequence[float]], path: Path, title: str) -> None:
    """Draw each layer's singular values, over its largest, and the norm of its update (PNG)."""
    import numpy as np

    names, widest = list(spectra), max((len(values) for values in spectra.values()), default=1)
    grid = np.full((len(names), max(widest, 1)), np.nan)
    for row, values in enumerate(spectra.values()):
        grid[row, : len(values)] = np.array(values) / max(values[0], 1e-300) if values else 0
    norms = [float(np.sqrt(np.square(values).sum())) for values in spectra.values()]
    figure = _figure(10, max(3.0, 1.2 + 0.14 * len(names)))
    left, right = figure.subplots(1, 2, width_ratios=(3, 1), sharey=True)
    drawn = left.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="none")
    figure.colorbar(drawn, ax=left, label="singular value over the layer's largest")
    left.set_yticks(range(len(names)), [printable(name) for name in names], fontsize=6)
    left.set_xlabel("singular value")
    right.barh(range(len(names)), norms, color=_BLUE)
    right.set_xlabel("norm of the update")
    right.grid(alpha=0.3)
    figure.suptitle(printable(title), parse_math=False)
    _save(figure, path)


def plot_comparison(
    layers: Mapping[str, Mapping[str, float]], path: Path, title: str, labels: Mapping[str, str]
) -> None:
    """Draw some figures of each layer side by side (PNG); labels: what each figure is called."""
    names = list(layers)
    figure = _figure(10, max(3.0, 1.2 + 0.14 * len(names)))
    panels = figure.subplots(1, len(labels), sharey=True)
    for axes, (key, label) in zip(panels, labels.items(), strict=True):
        axes.barh(range(len(names)), [layers[name][key] for name in names], color=_BLUE)
        axes.axvline(0, color="#555555", linewidth=0.8)
        axes.set_xlim(min(-0.05, *(layers[name][key] for name in names), 0), 1.05)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(names)), [printable(name) for name in names], fontsize=6)
    panels[0].invert_yaxis()
    figure.suptitle(printable(title), parse_math=False)
    _save(figure, path)
