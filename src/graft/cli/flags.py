"""From words on the command line to a configuration dataclass."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_origin

from graft.cli.command import Command
from graft.cli.fields import Flag, flags_of
from graft.cli.show import show
from graft.errors import GraftError, did_you_mean, raise_problems

Arguments = TypeVar("Arguments")

_HELP = ("-h", "--help", "--help-all")


def parse(command: Command[Arguments], words: Sequence[str], name: str) -> Arguments:
    """Return the configuration that the words after `graft <name>` describe.

    --help prints the page and exits; values that do not fit are told, and exit with status 2.
    Raises GraftError for a flag that there is not, and for a file that does not fit.
    """
    settings: dict[str, Any] = {}
    if command.takes_file and words and not words[0].startswith("-"):
        settings = _settings_of_file(words[0], command.arguments)
        words = words[1:]
    settings = {**command.given(words, settings), **settings}
    asked = [word for word in words if word in _HELP]
    if asked:
        from graft.cli.help import page

        show(page(command, name, settings, whole="--help-all" in asked))
        sys.exit(0)
    flags = flags_of(command.arguments, settings)
    _check_names(words, flags, name)
    return _parsed(command.arguments, flags, words, name)


def _settings_of_file(word: str, kind: type) -> dict[str, Any]:
    path = Path(word)
    if path.suffix not in (".yaml", ".yml"):
        raise GraftError(
            f"{word!r} is no flag and no configuration file (.yaml); flags begin with --"
        )
    from graft.api.settings import checked_settings
    from graft.files.read import read_yaml

    return checked_settings(read_yaml(path), kind, word)


def _check_names(words: Sequence[str], flags: Sequence[Flag], name: str) -> None:
    """Raise GraftError for every flag that there is not, with the nearest one that there is."""
    options = [flag for flag in flags if not flag.positional]
    known = {flag.name.replace("_", "-") for flag in options}
    negated = {f"no-{flag.name.replace('_', '-')}" for flag in options if not flag.kind.name}
    given = [word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")]
    problems = [
        f"unknown flag --{flag}{did_you_mean(flag, known | {'help', 'help-all'})}"
        for flag in given
        if flag.replace("_", "-") not in known | negated
    ]
    raise_problems(problems, f"graft {name} --help-all lists the flags")


def _parsed(
    kind: type[Arguments], flags: Sequence[Flag], words: Sequence[str], name: str
) -> Arguments:
    """Parse with tyro, by way of a dataclass whose choices are plain text, and check these then.

    So a table of names may grow while the program runs, and all wrong names are told at once.
    """
    import tyro  # and not above: a page of help does without

    fields = []
    for flag in flags:
        hint: Any = flag.hint
        if flag.kind.choices:
            hint = tuple[str, ...] if get_origin(hint) is tuple else str | None
        elif flag.positional:
            one = tyro.conf.Positional[str]
            hint = one if flag.required else tyro.conf.Positional[tuple[str, ...]]
        hint = Annotated[hint, tyro.conf.arg(help=flag.sentence)]
        fields.append((flag.name, hint, dataclasses.field(default=flag.default)))
    parsed: Any = tyro.cli(
        dataclasses.make_dataclass(kind.__name__, fields, kw_only=True),
        prog=f"graft {name}",
        args=words,
        config=(tyro.conf.DisallowNone, tyro.conf.OmitArgPrefixes),
    )
    values = {flag.name: getattr(parsed, flag.name) for flag in flags}
    problems = [
        f"graft {name}: error: --{flag.name.replace('_', '-')}: {problem}"
        for flag in flags
        if flag.kind.choices
        for value in _listed(values[flag.name])
        if (problem := flag.kind.problem(value)) is not None
    ]
    if problems:
        show("\n".join(problems), error=True)
        sys.exit(2)
    return kind(**values)


def _listed(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)
