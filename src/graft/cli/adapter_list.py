"""`graft adapter list`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from graft.cli.command import Command
from graft.cli.fields import Positionals
from graft.cli.show import show, show_json

_LONGEST = 40
_IMPORTANT = ("method", "rank", "targets", "base", "MiB", "alpha", "parameters", "start")


@dataclass(frozen=True, kw_only=True)
class ListArguments:
    """Where to look."""

    folder: Positionals = ()
    """Folders with adapters in or below them; default: here."""
    json: bool = False
    """Print JSON instead of a table."""


def list_them(arguments: ListArguments) -> None:
    """List the adapters below a folder: runs', PEFT's and those that graft wrote."""
    from graft.api.adapter.listing import list_adapters
    from graft.cli.tables import Column, print_table

    found = list_adapters(arguments.folder or ["."])
    if arguments.json:
        show_json({"adapters": [asdict(one) for one in found]})
        return
    if not found:
        show("no adapters here or three levels below")
        return
    figures = {
        "method": [one.method or "-" for one in found],
        "rank": [_ranks(one.ranks) for one in found],
        "alpha": ["-" if one.alpha is None else f"{one.alpha:g}" for one in found],
        "targets": [
            ", ".join(f"{count} {name}" for name, count in one.targets.items()) or "-"
            for one in found
        ],
        "base": [one.base or "-" for one in found],
        "start": [one.init or "-" for one in found],
        "parameters": ["-" if one.parameters is None else f"{one.parameters:,}" for one in found],
        "MiB": ["-" if one.bytes is None else f"{one.bytes / 2**20:.2f}" for one in found],
    }
    left = ("method", "targets", "base", "start")
    columns = [
        Column(title, [_short(text) for text in texts], title not in left)
        for title, texts in figures.items()
    ]
    first = Column("adapter", [_short(one.name) for one in found])
    print_table("adapters", first, columns, _IMPORTANT)
    for one in found:
        if one.problem is not None:
            show(f"{one.name}: {one.problem}")


def _ranks(ranks: Sequence[int]) -> str:
    if not ranks:
        return "-"
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else "…" + text[1 - _LONGEST :]


COMMAND = Command(arguments=ListArguments, run=list_them, loads_models=True)
