"""From words on the command line to a configuration dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from graft.api.settings import checked_settings
from graft.errors import GraftError, did_you_mean, raise_problems
from graft.files import read_yaml

Config = TypeVar("Config")

_MARKERS = (tyro.conf.DisallowNone, tyro.conf.OmitArgPrefixes)


def parse(kind: type[Config], words: Sequence[str], name: str, description: str) -> Config:
    """Return the configuration that the words after `graft <name>` describe.

    Wrong flags print tyro's message and exit with status 2.
    """
    _check_names(words, kind, name)
    return tyro.cli(
        kind, prog=f"graft {name}", description=description, args=words, config=_MARKERS
    )


def parse_with_file(
    kind: type[Config],
    words: Sequence[str],
    name: str,
    description: str,
    given: Mapping[str, Any] | None = None,
) -> Config:
    """As `parse`, with a leading CONFIG.yaml whose settings the flags override.

    `given` are settings that stand below the file's. Raises GraftError for a file that does not
    fit.
    """
    settings = dict(given or {})
    if words and not words[0].startswith("-"):
        path = Path(words[0])
        if path.suffix not in (".yaml", ".yml"):
            raise GraftError(
                f"{words[0]!r} is no flag and no configuration file (.yaml); flags begin with --"
            )
        settings |= checked_settings(read_yaml(path), kind, str(path))
        words = words[1:]
    if not settings:
        return parse(kind, words, name, description)
    _check_names(words, kind, name)
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    required = {
        field.name: tyro.MISSING
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    default = kind(**(required | settings))
    return tyro.cli(
        kind,
        prog=f"graft {name}",
        description=description,
        args=words,
        default=default,
        config=_MARKERS,
    )


def _check_names(words: Sequence[str], kind: type, name: str) -> None:
    """Raise GraftError for every flag that there is not, with the nearest one that there is."""
    known = {field.name.replace("_", "-") for field in dataclasses.fields(kind)} | {"help"}
    flags = [word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")]
    problems = [
        f"unknown flag --{flag}{did_you_mean(flag, known)}"
        for flag in flags
        if flag.replace("_", "-").removeprefix("no-") not in known
    ]
    raise_problems(problems, f"graft {name} --help lists the flags")
