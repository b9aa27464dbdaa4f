"""`graft demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from graft.cli.command import Command
from graft.cli.show import show

if TYPE_CHECKING:
    from rich.table import Table

    from graft.demo.run import DemoResult


@dataclass(frozen=True, kw_only=True)
class DemoArguments:
    """Where the tour leaves its files."""

    out: str = "graft-demo"
    """Folder to write."""


def demo(arguments: DemoArguments) -> None:
    """Fine-tune the bundled model on the bundled data, merge, export, and compare."""
    from rich.console import Console

    from graft.cli.progress import progress
    from graft.demo.run import run_demo

    with progress() as events:
        result = run_demo(Path(arguments.out), events)
    console = Console(highlight=False, soft_wrap=True)
    console.print(_table(result))
    console.print("\n[bold]A product that training never saw[/bold]")
    show(result.prompt)
    before, after = result.stations[0], result.stations[-1]
    for station in (before, after):
        console.print(f"\n[bold]{station.name}[/bold]")
        show(_shortened(station.sample))
    console.print("\n[bold]Files[/bold]")
    for name, path in result.files.items():
        show(f"  {name:<13} {path}")
    console.print(f"\n{result.seconds:.0f} s in all. [bold]Your own data next:[/bold]")
    show(
        "  graft train --model FOLDER_OR_HUB_ID --data rows.jsonl --method qalora --out run\n"
        "  graft export run --to gguf --out model.gguf\n"
        '  where a row is {"prompt": ..., "completion": ...}, {"text": ...} or {"messages": [...]}'
    )


def _table(result: DemoResult) -> Table:
    from rich.table import Table

    table = Table(title="Product descriptions from attributes, held-out products")
    table.add_column("model")
    table.add_column("held-out loss", justify="right")
    table.add_column("attributes mentioned", justify="right")
    for station in result.stations:
        table.add_row(station.name, f"{station.loss:.4f}", f"{station.share:.0%}")
    return table


def _shortened(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[:limit].rstrip() + " …"


COMMAND = Command(arguments=DemoArguments, run=demo, loads_models=True)
