"""`graft adapter compare`."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from graft.cli.command import Command
from graft.cli.fields import Positional
from graft.cli.show import show, show_json


@dataclass(frozen=True, kw_only=True)
class CompareAdaptersArguments:
    """Two adapters, and how they are shown."""

    first: Positional
    """A run, or the folder of an adapter."""
    second: Positional
    """Another of the same base."""
    picture: str | None = None
    """File of a picture of all layers to write (PNG)."""
    json: bool = False
    """Print JSON instead of a table."""


def compare(arguments: CompareAdaptersArguments) -> None:
    """Show how near two adapters are: the cosine of their updates, and the spaces they share."""
    from graft.api.adapter.show import compare_adapters
    from graft.cli.tables import Column, print_table

    found = compare_adapters(arguments.first, arguments.second, arguments.picture)
    if arguments.json:
        show_json(asdict(found))
        return
    layers = found.layers.values()
    columns = {
        "cosine": [f"{one.cosine:+.4f}" for one in layers],
        "inputs shared": [f"{one.input_similarity:.4f}" for one in layers],
        "outputs shared": [f"{one.output_similarity:.4f}" for one in layers],
        "norm, second over first": [f"{one.norm_ratio:.3g}" for one in layers],
    }
    print_table(
        f"cosine of the whole updates {found.cosine:+.4f}",
        Column("layer", [*found.layers]),
        [Column(title, texts) for title, texts in columns.items()],
        ("cosine", "inputs shared"),
    )
    for name, alone in ((found.first, found.first_alone), (found.second, found.second_alone)):
        if alone:
            show(f"{name} alone adapts {len(alone)} layers, such as {alone[0]}")
    if arguments.picture is not None:
        show(arguments.picture)


COMMAND = Command(arguments=CompareAdaptersArguments, run=compare, loads_models=True)
