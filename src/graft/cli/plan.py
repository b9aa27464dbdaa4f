"""`graft plan`."""

from __future__ import annotations

from graft.api.config import PlanConfig
from graft.cli.command import Command
from graft.cli.show import show, show_json


def plan(config: PlanConfig) -> None:
    """Predict the memory of a training run; no weights are read."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from graft.api.plan import plan as run
    from graft.text import printable

    memory = run(config)
    if config.json:
        show_json(memory.as_dict())
        return
    table = Table(title=Text(printable(f"{config.method} on {config.model}"), "table.title"))
    table.add_column("what")
    table.add_column("size", justify="right")
    table.add_column("note")
    for row in memory.table():
        table.add_row(*map(printable, row))
    Console().print(table, markup=False)
    show(f"checkpointing: {memory.checkpointing_reason}")
    if memory.left_out is not None:
        show(memory.left_out)


COMMAND = Command(arguments=PlanConfig, run=plan, loads_models=True, takes_file=True)
