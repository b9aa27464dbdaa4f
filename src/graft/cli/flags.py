"""From words on the command line to a configuration dataclass."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from graft.api.other_names import understood_note
from graft.cli.command import Command
from graft.cli.fields import Flag, flags_of, pairs_of
from graft.cli.show import show
from graft.cli.words import Given, option, split
from graft.errors import GraftError
from graft.text import quoted

Arguments = TypeVar("Arguments")

_HELP = ("-h", "--help", "--help-all")
_CONFIGURATION = (".yaml", ".yml")


class UsageError(GraftError):
    """Words that make no command, every mistake in a line of its own."""


def parse(command: Command[Arguments], words: Sequence[str], name: str) -> Arguments:
    """Return the configuration that the words after `graft <name>` describe.

    --help prints the page and exits. Raises UsageError with every flag that there is not, every
    value that does not fit, and everything that is missing; GraftError where nothing is wrong but
    the file.
    """
    settings: dict[str, Any] = {}
    of_file: list[str] = []
    understood: dict[str, str] = {}
    if command.takes_file and words and words[0].endswith(_CONFIGURATION):
        settings, understood, of_file = _settings_of_file(words[0], command.arguments)
        words = words[1:]
    asked = [word for word in words if word in _HELP]
    given = split([word for word in words if word not in _HELP], flags_of(command.arguments))
    if asked:
        from graft.cli.help import page

        with suppress(GraftError):
            settings = {**command.given(given.texts, settings), **settings}
        show(page(command, name, settings, whole="--help-all" in asked))
        sys.exit(0)
    problems = [*of_file, *given.problems]
    for flag, other in pairs_of(command.arguments):
        if flag in given.texts and other not in given.texts:
            settings.pop(other, None)
    if not problems:
        settings = {**command.given(given.texts, settings), **settings}
    values = _read(flags_of(command.arguments, settings), given, problems)
    if problems:
        kind = GraftError if problems == of_file else UsageError
        raise kind(_told(problems, name))
    understood |= given.understood
    if understood:
        show(understood_note(understood), error=True)
    return command.arguments(**values)


def _told(problems: Sequence[str], name: str) -> str:
    """Return all mistakes, each in a line, with where the flags are listed if that may help."""
    lists = any("unknown " in problem for problem in problems)
    hint = f" (graft {name} --help-all lists the flags)" if lists else ""
    if len(problems) == 1:
        return problems[0] + hint
    lines = "\n".join(f"  - {problem}" for problem in problems)
    return f"{len(problems)} mistakes{hint}\n{lines}"


def _settings_of_file(file: str, kind: type) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    from graft.api.settings import check_settings
    from graft.files.read import read_yaml

    settings, understood, problems = check_settings(read_yaml(Path(file)), kind)
    return settings, understood, [f"{file}: {problem}" for problem in problems]


def _read(flags: Sequence[Flag], given: Given, problems: list[str]) -> dict[str, Any]:
    """Return the values of all flags, and add what does not fit, or is missing, to the problems."""
    values: dict[str, Any] = {}
    for flag in flags:
        texts = given.texts.get(flag.name)
        name = flag.name.upper() if flag.positional else option(flag.name)
        if texts is None:
            values[flag.name] = flag.default
            if flag.required and flag.name not in given.asked:
                problems.append(f"{name} is missing: {flag.sentence}")
            continue
        read = []
        for text in texts:
            try:
                read.append(flag.kind.read(text))
            except ValueError as error:
                what = name if flag.kind.choices else f"{name} {quoted(text)}"
                problems.append(f"{what}: {error}")
        values[flag.name] = tuple(read) if flag.kind.many else (read or [None])[-1]
    return values
