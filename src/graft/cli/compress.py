"""`graft compress`."""

from __future__ import annotations

from pathlib import Path

from graft.api.config import CompressConfig
from graft.cli.command import Command
from graft.cli.show import show


def compress(config: CompressConfig) -> None:
    """Write low-rank factors of a model's matrices, rounded or not, and measure what they cost."""
    from rich.console import Console
    from rich.table import Table

    from graft.api.compress import CURVE, PICTURE
    from graft.api.compress import compress as run
    from graft.cli.progress import progress
    from graft.text import printable

    with progress() as events:
        curve = run(config, events)
    table = Table(*("model", "MiB", "weights", "perplexity", "error of the weights"))
    for column in table.columns[1:]:
        column.justify = "right"
    for point in (*curve.beside, *curve.points):
        perplexity = "-" if point.perplexity is None else f"{point.perplexity:.4f}"
        size = f"{point.bytes / 2**20:,.2f}"
        error = f"{point.weight_error:.3%}"
        table.add_row(printable(point.name), size, f"{point.parameters:,}", perplexity, error)
    Console().print(table, markup=False)
    for point in curve.points:
        folder = Path(config.out) / (point.folder or "")
        show(f"{point.name}: {folder}")
    if len(curve.points) > 1:
        show(f"curve: {Path(config.out) / CURVE}, picture: {Path(config.out) / PICTURE}")


COMMAND = Command(arguments=CompressConfig, run=compress, loads_models=True, takes_file=True)
