"""Tables that are as wide as the terminal, or whole where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from graft.text import printable


class Column(NamedTuple):
    """A column: its title, and a text for each row."""

    title: str
    texts: Sequence[str]
    right: bool = True
    """Whether the texts end at the right, as numbers do."""


def print_table(
    title: str,
    first: Column,
    columns: Sequence[Column],
    important: Sequence[str] = (),
    console: Console | None = None,
) -> None:
    """Print the columns that the terminal has room for; all of them where there is no terminal.

    important: titles in the order in which they are to be kept; the others follow in theirs.
    """
    console = console or Console(highlight=False)
    first, *columns = [
        Column(printable(one.title), [*map(printable, one.texts)], one.right)
        for one in (first, *columns)
    ]
    widths = [max(map(len, [column.title, *column.texts])) + 3 for column in columns]
    taken = 4 + max(map(len, [first.title, *first.texts]))
    shown = set()

    def importance(index: int) -> int:
        name = columns[index].title
        return important.index(name) if name in important else len(important)

    for index in sorted(range(len(columns)), key=importance):
        if not console.is_terminal or taken + widths[index] <= console.width:
            taken += widths[index]
            shown.add(index)
    chosen = [column for index, column in enumerate(columns) if index in shown]
    table = Table(title=Text(printable(title), style="table.title"))
    table.add_column(first.title)
    for column in chosen:
        table.add_column(column.title, justify="right" if column.right else "left")
    for row, label in enumerate(first.texts):
        table.add_row(label, *(column.texts[row] for column in chosen))
    console.width = max(console.width, taken)
    console.print(table, markup=False)
