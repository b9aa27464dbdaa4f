"""`graft adapter show`."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from graft.cli.command import Command
from graft.cli.fields import Positional
from graft.cli.show import show, show_json


@dataclass(frozen=True, kw_only=True)
class ShowArguments:
    """The adapter, and how it is shown."""

    adapter: Positional
    """A run, or the folder of an adapter."""
    picture: str | None = None
    """File of a picture of all singular values to write (PNG)."""
    json: bool = False
    """Print JSON, with all singular values, instead of a table."""


def show_one(arguments: ShowArguments) -> None:
    """Show the layers of an adapter: ranks, norms of the updates, singular values."""
    from graft.api.adapter.show import show_adapter
    from graft.cli.tables import Column, print_table

    shown = show_adapter(arguments.adapter, arguments.picture)
    if arguments.json:
        show_json(asdict(shown))
        return
    layers = shown.layers.values()
    columns = {
        "rank": [f"{one.rank}" for one in layers],
        "scaling": [f"{one.scaling:g}" for one in layers],
        "norm": [f"{one.norm:.4g}" for one in layers],
        "largest": [f"{one.largest:.4g}" for one in layers],
        "effective rank": [f"{one.effective_rank:.1f}" for one in layers],
        "rank for 95 %": [f"{one.rank_95}" for one in layers],
    }
    print_table(
        f"{shown.parameters:,} parameters, base {shown.base or 'not named'}",
        Column("layer", [*shown.layers]),
        [Column(title, texts) for title, texts in columns.items()],
        ("rank", "norm", "effective rank"),
    )
    if arguments.picture is not None:
        show(arguments.picture)


COMMAND = Command(arguments=ShowArguments, run=show_one, loads_models=True)
