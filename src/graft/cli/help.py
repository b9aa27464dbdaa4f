"""The page of a command's flags: required ones first, then by group, in one or two lines each."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from graft.cli.command import Command
from graft.cli.fields import REQUIRED, Flag, flags_of

NARROW, WIDE = 60, 100
"""Columns of a page: as many as the terminal has, within these."""
SCREEN = 40
"""Lines of a page that --help shows whole, each flag with all that there is to say of it."""

_ORDER = ("method", "data", "quantisation", "training", "output", "model and machine")
"""The order of groups; those of a single command stand before, the required flags first of all."""
_WIDEST_FLAG = 26


def page(
    command: Command[Any], name: str, settings: Mapping[str, Any] | None = None, *, whole: bool
) -> str:
    """Return the help of `graft <name>`: whole, or without the rare flags and second sentences.

    `settings` are shown as the defaults of the fields that they name.
    """
    width = max(NARROW, min(shutil.get_terminal_size().columns, WIDE))
    flags = flags_of(command.arguments, settings)
    common = [flag for flag in flags if not flag.rare]
    lines = _head(command, name, flags, width)
    if whole:
        return "\n".join([*lines, *_listing(flags, width, both=command.takes_file)])
    hint = f"graft {name} --help-all says more of each flag"
    if len(common) < len(flags):
        hint += f", and lists {len(flags) - len(common)} more"
    listing = _listing(common, width)
    if len(lines) + len(listing) > SCREEN:
        listing = _listing(common, width, limit=2)
    elif len(common) == len(flags):
        return "\n".join([*lines, *listing])
    return "\n".join([*lines, *listing, "", f"{hint}."])


def _head(command: Command[Any], name: str, flags: Sequence[Flag], width: int) -> list[str]:
    needed = sorted((flag for flag in flags if flag.required), key=lambda flag: not flag.positional)
    words = ["[CONFIG.yaml]"] if command.takes_file else []
    words += map(_written, needed)
    words += [f"[{_written(one)}]" for one in flags if one.positional and not one.required]
    words += ["[flags]"] if len(flags) > len(needed) else []
    about = (command.run.__doc__ or "").partition("\n\n")[0]
    lines = [
        _painted("1", "usage:") + f" graft {name} {' '.join(words)}",
        "",
        *_wrapped(" ".join(about.split()), width),
    ]
    if command.takes_file:
        lines += _wrapped("CONFIG.yaml has the flags' names as its keys; flags override it.", width)
    return lines


def _listing(
    flags: Sequence[Flag], width: int, limit: int | None = None, both: bool = False
) -> list[str]:
    """Return the lines of all groups; with a limit, flags get their first sentence in so many.

    With `both`, a flag of yes or no is written with its opposite, which a file's yes may need.
    """
    groups: dict[str, list[Flag]] = {}
    for flag in flags:
        groups.setdefault(flag.group, []).append(flag)
    written = {flag.name: _written(flag, both) for flag in flags}
    indent = 4 + min(_WIDEST_FLAG, max(map(len, written.values())))
    lines = []
    for group in sorted(groups, key=_place):
        lines += ["", _painted("1", group)]
        for flag in sorted(groups[group], key=lambda flag: not flag.positional):
            text = _text(flag, width - indent, limit)
            left = written[flag.name]
            # The flag stands before its text, or in a line of its own where it is too long.
            gap = " " * (indent - 2 - len(left)) if len(left) + 4 <= indent else ""
            option, space, value = left.partition(" ")
            first = f"  {_painted('36', option)}{space}{value}"
            if gap and text:
                first += gap + text.pop(0)
            lines += [first, *(" " * indent + line for line in text)]
    return lines


def _place(group: str) -> int:
    if group == REQUIRED:
        return -2
    return _ORDER.index(group) if group in _ORDER else -1


def _option(flag: Flag) -> str:
    return "--" + flag.name.replace("_", "-")


def _written(flag: Flag, both: bool = False) -> str:
    """Return a flag as it is given: --rank INT, --dora, or with `both` --[no-]dora."""
    if flag.positional:
        name = flag.name.upper()
        return name if flag.required else f"{name} ..."
    option, value = _option(flag), flag.kind.name
    if not value:
        return option if flag.default is False and not both else f"--[no-]{option[2:]}"
    return f"{option} {value}".replace("TEXT", flag.name.rpartition("_")[2].upper())


def _text(flag: Flag, width: int, limit: int | None) -> list[str]:
    """Return what is said of a flag, in at most `limit` lines: values, docstring, default."""
    choices = flag.kind.choices
    after = _default(flag.default)
    if limit is None and any(choices.values()):
        lines = _wrapped(" ".join(part for part in (flag.text, after) if part), width)
        for name, summary in choices.items():
            lines += _wrapped(f"{name}: {summary}".removesuffix(": "), width, "  ", "    ")
        return lines
    before = f"{{{', '.join(choices)}}}" if choices else ""
    if limit is None:
        return _wrapped(" ".join(part for part in (before, flag.text, after) if part), width)
    if len(before) > width:  # more than a line of names
        end = max(before.rfind(",", 0, max(0, width - 20)), before.index(","))
        before = before[: end + 1] + f" ... {len(choices)} in all}}"
    for shorter in _shorter(flag.sentence):
        lines = _wrapped(" ".join(part for part in (before, shorter, after) if part), width)
        if len(lines) <= limit:
            break
    return lines


def _shorter(sentence: str) -> Iterator[str]:
    """Yield a sentence, then ever shorter beginnings of it, which end at a comma where one is."""
    yield sentence
    words = sentence.split()
    for count in range(len(words) - 1, -1, -1):
        clause = next(
            (end for end in range(count, count * 2 // 3, -1) if words[end - 1][-1] in ",;"), count
        )
        yield " ".join(words[:clause]).rstrip(",;:(") + " …"


def _default(value: Any) -> str:
    """Return a default in words; nothing where the docstring says what happens without the flag."""
    if value is True:
        return "(default:\xa0yes)"
    if isinstance(value, list | tuple):
        value = " ".join(map(str, value))
        return f"(default:\xa0{value})" if value else ""
    if isinstance(value, str):
        return f"(default:\xa0{value if value.isprintable() and value else json.dumps(value)})"
    # A number; by identity, because 0 equals False.
    return f"(default:\xa0{value})" if isinstance(value, int | float) and value is not False else ""


def _wrapped(text: str, width: int, first: str = "", rest: str = "") -> list[str]:
    """Return a text in lines; a no-break space becomes a plain one that no line ends at."""
    lines = textwrap.wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace("\xa0", " ") for line in lines]


def _painted(code: str, text: str) -> str:
    """Return a text in a colour where a person reads it on a terminal that knows colours."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain or not sys.stdout.isatty() else f"\x1b[{code}m{text}\x1b[0m"
