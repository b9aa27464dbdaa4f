"""What a command is: the dataclass of its arguments, and a function that takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from graft.entries import Entries

Arguments = TypeVar("Arguments")


def _nothing(texts: Mapping[str, Sequence[str]], settings: Mapping[str, Any]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Command(Generic[Arguments]):
    """One command; the first paragraph of the function's docstring heads the command's help."""

    arguments: type[Arguments]
    """A dataclass whose fields are the flags."""
    run: Callable[[Arguments], None]
    """Does the work and shows its result."""
    loads_models: bool = False
    """Whether it is for models: what they take is imported first then, see `import_models`."""
    takes_file: bool = False
    """Whether a CONFIG.yaml may stand before the flags."""
    given: Callable[[Mapping[str, Sequence[str]], Mapping[str, Any]], Mapping[str, Any]] = _nothing
    """From the flags' texts by field, and the file's settings, to settings that stand below
    both."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Commands that are called by two words: `graft adapter show`."""

    about: str
    """A sentence at the head of the group's help."""
    commands: Entries[Command[Any]]


def is_asked(name: str, texts: Mapping[str, Sequence[str]], settings: Mapping[str, Any]) -> bool:
    """Return whether a flag of yes or no says yes, or else the file's settings do."""
    return texts[name] == ["true"] if name in texts else bool(settings.get(name))
