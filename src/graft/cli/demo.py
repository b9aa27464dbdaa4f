"""What `graft demo` shows."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from graft.cli.progress import TerminalEvents
from graft.demo.run import DemoResult, run_demo


def show_demo(out: Path) -> None:
    """Run the demo into `out` and print its table, samples, files and what to do next."""
    with TerminalEvents(Console(stderr=True)) as events:
        result = run_demo(out, events)
    console = Console(highlight=False, soft_wrap=True)
    console.print(_table(result))
    console.print("\n[bold]A product that training never saw[/bold]")
    console.print(result.prompt, markup=False)
    before, after = result.stations[0], result.stations[-1]
    for station in (before, after):
        console.print(f"\n[bold]{station.name}[/bold]")
        console.print(_shortened(station.sample), markup=False)
    console.print("\n[bold]Files[/bold]")
    for name, path in result.files.items():
        console.print(f"  {name:<13} {path}", markup=False)
    console.print(f"\n{result.seconds:.0f} s in all. [bold]Your own data next:[/bold]")
    console.print(
        "  graft train --model FOLDER_OR_HUB_ID --data rows.jsonl --method qalora --out run\n"
        "  graft export run --to gguf --out model.gguf\n"
        '  where a row is {"prompt": ..., "completion": ...}, {"text": ...} or {"messages": [...]}',
        markup=False,
    )


def _table(result: DemoResult) -> Table:
    table = Table(title="Product descriptions from attributes, held-out products")
    table.add_column("model")
    table.add_column("held-out loss", justify="right")
    table.add_column("attributes mentioned", justify="right")
    for station in result.stations:
        table.add_row(station.name, f"{station.loss:.4f}", f"{station.share:.0%}")
    return table


def _shortened(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[:limit].rstrip() + " …"
