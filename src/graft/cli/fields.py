"""What a configuration dataclass says of its flags: type, default, docstring, group.

A component's dataclass may carry class attributes. `GROUP: ClassVar[str]` is the title under which
help lists the fields that the class declares; `RARE: ClassVar[frozenset[str]]` names those of them
that only --help-all lists; `EITHER_OR: ClassVar[tuple[tuple[str, str], ...]]` has pairs of which a
flag for the one takes the place of what a file says of the other.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from graft.entries import Entries
from graft.errors import did_you_mean

POSITIONAL: Final = "positional"
Positional = Annotated[str, POSITIONAL]
"""A text that is given by its place, without a flag."""
Positionals = Annotated[tuple[str, ...], POSITIONAL]
"""Any number of texts that are given by their place."""

REQUIRED: Final = "required"
"""The title of the fields without a default."""
OTHER: Final = "options"
"""The title of the fields of a class that says none."""

YES_OR_NO: Final = {"true": True, "yes": True, "false": False, "no": False}
"""What may stand behind a flag of yes or no."""


_EXPECTED: Final = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


@dataclasses.dataclass(frozen=True)
class Kind:
    """What values a flag takes."""

    name: str
    """For the place of the value in help; empty for yes or no."""
    choices: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """All values that there are, each with half a line on it or nothing; empty where any goes."""
    entries: Entries[Any] | None = None
    """The table that they are the names of, if it is one."""
    types: tuple[type, ...] = (str,)
    """Where any value goes, what it is read as: the first that takes it."""
    words: tuple[str, ...] = ()
    """Values beside those that the types take."""
    many: bool = False
    """Whether it takes any number of values."""

    @property
    def is_switch(self) -> bool:
        """Whether it stands for yes or no, and may stand without a value."""
        return self.types == (bool,)

    def read(self, text: str) -> Any:
        """Return what one text stands for; raises ValueError that says what was expected."""
        if self.choices:
            if (problem := self.problem(text)) is not None:
                raise ValueError(problem)
            return text
        if text in self.words:
            return text
        for kind in self.types:
            with suppress(ValueError, KeyError):
                return YES_OR_NO[text.lower()] if kind is bool else kind(text)
        raise ValueError(f"expected {self.expected}")

    @property
    def expected(self) -> str:
        """What a value is, in words."""
        return " or ".join(self.choices or (*(_EXPECTED[kind] for kind in self.types), *self.words))

    def problem(self, value: str) -> str | None:
        """Return what is wrong with a value, with the nearest choice, or None for a choice."""
        if self.entries is not None:
            return self.entries.problem(value)
        if value in self.choices:
            return None
        return f"unknown value {value!r}{did_you_mean(value, self.choices)}"


@dataclasses.dataclass(frozen=True)
class Flag:
    """One field of a configuration, as the command line sees it."""

    name: str
    hint: Any
    default: Any
    """dataclasses.MISSING where the flag must be given."""
    text: str
    """The field's docstring, in one line."""
    group: str
    rare: bool

    @property
    def required(self) -> bool:
        """Whether the flag must be given."""
        return self.default is dataclasses.MISSING

    @property
    def positional(self) -> bool:
        """Whether its value stands alone."""
        return POSITIONAL in getattr(self.hint, "__metadata__", ())

    @property
    def sentence(self) -> str:
        """The first sentence of its docstring."""
        return re.split(r"(?<=\.)(?<!\.\.\.)\s", self.text, maxsplit=1)[0]

    @property
    def kind(self) -> Kind:
        """What values it takes."""
        return _kind(self.hint)


def flags_of(kind: type, settings: Mapping[str, Any] | None = None) -> list[Flag]:
    """Return the flags of a configuration, in the order of its fields.

    `settings` stand in for the defaults of the fields that they name.
    """
    settings = settings or {}
    hints = get_type_hints(kind, include_extras=True)
    flags = []
    for field in dataclasses.fields(kind):
        declaring = _declaring(kind, field.name)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        default = settings.get(field.name, default)
        required = default is dataclasses.MISSING
        flags.append(
            Flag(
                name=field.name,
                hint=hints[field.name],
                default=default,
                text=_docstrings(declaring).get(field.name, ""),
                group=REQUIRED if required else getattr(declaring, "GROUP", OTHER),
                rare=not required and field.name in getattr(declaring, "RARE", ()),
            )
        )
    return flags


def pairs_of(kind: type) -> list[tuple[str, str]]:
    """Return the pairs of which one takes the other's place, in either order."""
    pairs = {pair for base in kind.__mro__ for pair in vars(base).get("EITHER_OR", ())}
    return [order for one, other in sorted(pairs) for order in ((one, other), (other, one))]


def _declaring(kind: type, name: str) -> type:
    return next(base for base in kind.__mro__ if name in inspect.get_annotations(base))


@cache
def _docstrings(kind: type) -> dict[str, str]:
    """Return the strings that stand behind a class's own fields; none where the source is not."""
    try:
        source = inspect.getsource(kind)
    except OSError:
        return {}
    (definition,) = ast.parse(textwrap.dedent(source)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, after in pairwise(definition.body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            found[field.target.id] = " ".join(str(after.value.value).split())
    return found


def _kind(hint: Any) -> Kind:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        entries = [part for part in parts[1:] if isinstance(part, Entries)]
        if not entries:
            return _kind(parts[0])
        table = entries[0]
        return Kind("NAME", {name: table.summary(name) for name in table}, table)
    if origin is Literal:
        return Kind("NAME", dict.fromkeys(map(str, parts), ""))
    if origin in (Union, UnionType):
        kinds = [_kind(part) for part in parts if part is not NoneType]
        if len(kinds) == 1:
            return kinds[0]
        return Kind(
            "|".join(word for kind in kinds for word in kind.choices or [kind.name]),
            types=tuple(one for kind in kinds if not kind.choices for one in kind.types),
            words=tuple(word for kind in kinds for word in kind.choices),
        )
    if origin is tuple:
        one = _kind(parts[0])
        return dataclasses.replace(one, name=f"{one.name} ...", many=True)
    return Kind({bool: "", int: "INT", float: "FLOAT", str: "TEXT"}[hint], types=(hint,))
