"""`graft plan`."""

from __future__ import annotations

import json

from graft.api.config import PlanConfig
from graft.cli.command import Command


def plan(config: PlanConfig) -> None:
    """Predict the memory of a training run; no weights are read."""
    from rich.console import Console
    from rich.table import Table

    from graft.api.plan import plan as run

    memory = run(config)
    if config.json:
        print(json.dumps(memory.as_dict(), indent=2))
        return
    table = Table(title=f"{config.method} on {config.model}")
    table.add_column("what")
    table.add_column("size", justify="right")
    table.add_column("note")
    for row in memory.table():
        table.add_row(*row)
    Console().print(table)
    print(f"checkpointing: {memory.checkpointing_reason}")


COMMAND = Command(arguments=PlanConfig, run=plan, takes_file=True)
