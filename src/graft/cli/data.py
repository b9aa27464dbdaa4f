"""`graft data`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from graft.cli.command import Command
from graft.cli.fields import Positional
from graft.cli.show import show, show_json
from graft.data.config import DataConfig
from graft.errors import GraftError
from graft.model.config import TrustConfig
from graft.objectives.registry import DEFAULT_OBJECTIVE, OBJECTIVES

if TYPE_CHECKING:
    from rich.text import Text

    from graft.api.data import DataReport, Part, ShownRow
    from graft.model.pieces import Piece


@dataclass(frozen=True, kw_only=True)
class _Model:
    model: Positional
    """A model folder, a folder with a tokenizer alone, or a hub id."""


@dataclass(frozen=True, kw_only=True)
class DataArguments(DataConfig, TrustConfig, _Model):
    """The data, for which model, and what is shown of them."""

    GROUP: ClassVar[str] = "what is shown"

    data: Positional
    """File of examples, as graft train takes it."""
    rows: int = 3
    """Training rows that are shown token by token."""
    row: int | None = None
    """One row to show instead, by the number that stands behind its file's name in messages."""
    objective: Annotated[str, OBJECTIVES] = DEFAULT_OBJECTIVE
    """What is to be learnt: of rows of preferences dpo, orpo and kto take both answers."""
    html: str | None = None
    """File to write a page of all this to, which needs no network."""
    seed: int = 0
    """Seed of the held-out split, as that of graft train."""
    json: bool = False
    """Print one JSON object instead of text."""


def data(arguments: DataArguments) -> None:
    """Show what a model would be trained on: rows token by token, shares, cuts, lengths, doubles.

    Raises GraftError with every problem that training would raise for the data.
    """
    from graft.api.data import look_at_data

    if arguments.html is not None and Path(arguments.html).is_dir():
        raise GraftError(f"--html {arguments.html} is a folder; name a file, such as data.html")
    report = look_at_data(
        arguments.model,
        DataConfig(**{one.name: getattr(arguments, one.name) for one in fields(DataConfig)}),
        seed=arguments.seed,
        rows=arguments.rows,
        row=arguments.row,
        objective=arguments.objective,
        trust_remote_code=arguments.trust_remote_code,
    )
    if arguments.html is not None:
        from graft.cli.data_page import write_page

        write_page(Path(arguments.html), report)
    if arguments.json:
        show_json(report.as_dict())
        return
    show(f"{report.data} for {report.model}: {report.kind} rows")
    for line in _summary(report):
        show(line)
    for note in report.notes:
        show(f"note: {note}")
    show("")
    for line in _histogram(report):
        show(line)
    show_rows(report.rows)
    if arguments.html is not None:
        show(f"page: {arguments.html}")


def facts(report: DataReport) -> list[tuple[str, str, str]]:
    """Return what there is to say of training and held-out rows: (what, training, held out)."""
    lines: dict[str, Callable[[Part], str]] = {
        "rows": lambda part: f"{part.rows:,}",
        "windows of them": lambda part: f"{part.examples:,}",
        "tokens": lambda part: f"{part.tokens:,}",
        "tokens that are trained": lambda part: _share(part.trained_tokens, part.tokens),
        "tokens that are not": lambda part: _share(part.tokens - part.trained_tokens, part.tokens),
        "rows cut, tokens lost": lambda part: f"{part.cut_rows:,}, {part.lost_tokens:,}",
        "end of sequence trained": lambda part: _share(part.eos_rows, part.examples),
        "tokens of a row": _lengths,
    }
    both = (report.training, report.held_out)
    if all(part.examples == part.rows for part in both):
        del lines["windows of them"]
    found = [(what, words(both[0]), words(both[1])) for what, words in lines.items()]
    twice = report.overlap
    found += [
        ("rows that are there before", f"{twice.repeated:,}", ""),
        ("rows that are trained too", "", f"{twice.held_out_trained:,}"),
        ("rows that are nearly trained", "", f"{len(report.twins):,}"),
        ("prompts that are trained too", "", f"{twice.prompts_trained:,}"),
    ]
    return found


def _share(count: int, of: int) -> str:
    return f"{count:,} ({count / of:.1%})" if of else "0"


def _lengths(part: Part) -> str:
    return f"{part.shortest:,} to {part.longest:,}, median {part.median:,}"


def _summary(report: DataReport) -> Iterator[str]:
    found = [("", "training", "held out"), *facts(report)]
    widths = [max(len(row[column]) for row in found) for column in range(3)]
    for row in found:
        what, *values = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        yield "  ".join(["", what, *values]).rstrip()


_BAR = 40


def _histogram(report: DataReport) -> Iterator[str]:
    lengths = report.lengths
    most = max(lengths.counts)
    yield f"training rows by their tokens (at most {report.max_length:,} are kept)"
    wide = len(f"{lengths.bars[-1]:,}")
    for begin, end, count in zip(lengths.bars, lengths.bars[1:], lengths.counts, strict=False):
        bar = "█" * round(_BAR * count / most) or ("▏" if count else "")
        yield f"  {begin:>{wide},} to {end - 1:>{wide},}  {bar} {count:,}".rstrip()
    yield ""


_WHITE = "white space: · space, ↵ new line, ⇥ tab"
_DIVIDED = "shades and underlines tell one token from the next"
LEGEND = f"[trained] in brackets, tokens divided by ¦, special ones in ⟨ ⟩; {_WHITE}"
"""What the marks say where there are no colours."""

_MOST_SHOWN = 200
"""Tokens of a stretch that a terminal shows from its beginning, and as many from its end."""


def show_rows(rows: Sequence[ShownRow]) -> None:
    """Print rows token by token: in colours where a terminal has them, else with marks."""
    from rich.console import Console

    console = Console(highlight=False)
    plain = not console.is_terminal or console.no_color or os.environ.get("TERM") == "dumb"
    show(LEGEND if plain else f"trained tokens stand on green, {_DIVIDED}; {_WHITE}")
    for row in rows:
        show(f"\n{heading(row)}")
        if plain:
            show(marked(row.pieces))
        else:
            greens = _TRAINED if console.color_system in ("256", "truecolor") else _OF_FEW
            console.print(_painted(row.pieces, greens), soft_wrap=False)


def heading(row: ShownRow) -> str:
    """Return what is said of a row above its tokens."""
    trained = sum(len(piece.ids) for piece in row.pieces if piece.trained)
    total = sum(len(piece.ids) for piece in row.pieces)
    words = [f"{row.where}: {total:,} tokens, {trained:,} trained"]
    if row.window:
        words.append(f"window {row.window + 1} of its row")
    if row.cut:
        words.append(f"cut, {row.lost:,} tokens lost")
    if row.held_out:
        words.append("held out")
    return ", ".join(words)


def shortened(pieces: Sequence[Piece], most: int) -> tuple[list[Piece], int, list[Piece]]:
    """Return the first and the last pieces of a stretch, and how many between are left out."""
    if len(pieces) <= 2 * most:
        return list(pieces), 0, []
    return list(pieces[:most]), len(pieces) - 2 * most, list(pieces[-most:])


def marked(pieces: Sequence[Piece]) -> str:
    """Return a row with brackets around what is trained, for where there are no colours."""
    from graft.model.pieces import stretches, visible

    def text(piece: Piece) -> str:
        shown = visible(piece.text)
        return f"⟨{shown}⟩" if piece.special else shown

    parts = []
    for trained, some in stretches(pieces):
        first, left_out, last = shortened(some, _MOST_SHOWN)
        joined = "¦".join(map(text, first))
        if left_out:
            joined += f"¦ … {left_out:,} tokens … ¦" + "¦".join(map(text, last))
        parts.append(f"[{joined}]" if trained else joined)
    return "".join(parts)


def _painted(pieces: Sequence[Piece], greens: tuple[str, str]) -> Text:
    """Return a row in colours, its trained tokens in two of them."""
    from rich.text import Text

    from graft.model.pieces import stretches, visible

    found = Text()
    for trained, some in stretches(pieces):
        first, left_out, last = shortened(some, _MOST_SHOWN)
        shades = greens if trained else _OTHERS
        for number, piece in enumerate(first):
            found.append(visible(piece.text), _style(shades[number % 2], piece))
        if left_out:
            found.append(f" … {left_out:,} tokens … ", "italic")
        for number, piece in enumerate(last):
            found.append(visible(piece.text), _style(shades[number % 2], piece))
    return found


_INK = "#10301a"
_TRAINED = (f"{_INK} on #b5e3bd", f"{_INK} on #8fd09d")
_OTHERS = ("", "underline")
"""Two shades of either, which take turns; both are read on a light and on a dark ground."""
_OF_FEW = ("black on green", "black on bright_green")
"""For what is trained where a terminal has 16 colours, of which the others would be one, white."""


def _style(shade: str, piece: Piece) -> str:
    if not piece.special:
        return shade
    if shade in _OTHERS:
        return f"bold magenta {shade}"
    return f"bold {shade.replace(_INK, '#6a1b9a')}"


COMMAND = Command(arguments=DataArguments, run=data, loads_models=True)
