"""YAML configuration files: the same keys as the flags, checked strictly."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from functools import reduce
from operator import or_
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from graft.api.other_names import answer, refused_value, values_here
from graft.entries import Entries
from graft.errors import nearest, raise_problems
from graft.files.read import read_yaml
from graft.text import quoted

TRUST = "trust_remote_code"
"""The field that no file decides."""


def checked_settings(values: Mapping[str, Any], kind: type, where: str) -> dict[str, Any]:
    """Return settings converted to the types of the dataclass `kind`.

    Raises GraftError with every unknown key, with a suggestion, every value of a wrong type, and
    trust in a model's own code, which only a caller has to give.
    """
    checked, _, problems = check_settings(values, kind)
    raise_problems(problems, where)
    return checked


def check_settings(
    values: Mapping[str, Any], kind: type
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Return what `checked_settings` does, names of other tools with ours, and all problems."""
    from pydantic import TypeAdapter, ValidationError  # and not above: flags alone do without

    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = get_type_hints(kind, include_extras=True)
    checked: dict[str, Any] = {}
    keys: dict[str, object] = {}
    understood: dict[str, str] = {}
    problems: list[str] = []
    for key, given in values.items():
        name, value = str(key).replace("-", "_"), given
        if name == TRUST:
            if value:
                problems.append(
                    f"{key} is {quoted(value)}: a file may come from elsewhere, so that a model's "
                    "own code is run on the word of the command line alone; give "
                    "--trust-remote-code"
                )
            continue
        if name not in fields:
            found = answer(name, fields)
            if found is None or found.ours is None:
                problems.append(
                    _unknown(key, name, fields) if found is None else f"{key}: {found.advice}"
                )
                continue
            understood[str(key)], name = found.ours, found.ours
            texts = [str(one) for one in (value if isinstance(value, list) else [value])]
            if (instead := refused_value(name, texts)) is not None:
                problems.append(f"{key} is {quoted(value)}: {instead}")
                continue
            if isinstance(value, str):
                parts = values_here(str(key), name, [value])
                value = parts if len(parts) > 1 else parts[0] if parts else value
        if name in keys:
            problems.append(f"{keys[name]} and {key} are the same setting; give one of them")
            continue
        keys[name] = key
        hint = _with_choices(hints[name])
        try:
            checked[name] = TypeAdapter(hint).validate_python(_listed(value, hint))
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            problems.append(f"{key} is {quoted(value)}: {reason}")
    return checked, understood, problems


def _unknown(key: object, name: str, known: Iterable[str]) -> str:
    near = nearest(name, known)
    return f"unknown key {quoted(key)}" + (f"; did you mean {near!r}?" if near else "")


def stored_settings(file: Path, kind: type) -> dict[str, Any]:
    """Return the settings that a run's config.yaml holds, checked; raises as `checked_settings`."""
    written = read_yaml(file)
    written.pop(TRUST, None)  # which earlier versions wrote, and no file may say
    # Version 0.1.0 knew two of today's choices under another name.
    recomputes = written.pop("gradient_checkpointing", None)
    if recomputes is not None:
        written["checkpointing"] = "layers" if recomputes else "none"
    written.setdefault("batching", "padded")  # earlier versions knew no other
    return checked_settings(written, kind, str(file))


def _with_choices(hint: Any) -> Any:
    """Return a field's type with a check of the name in the place of Annotated[str, entries]."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        entries = [part for part in parts[1:] if isinstance(part, Entries)]
        return _name_of(entries[0]) if entries else hint
    if origin in (Union, UnionType):
        return reduce(or_, map(_with_choices, parts))
    if origin is tuple:
        return tuple[tuple(map(_with_choices, parts))]  # type: ignore[misc]
    return hint


def _name_of(entries: Entries[Any]) -> Any:
    """Return a type for pydantic that takes the names of the entries and no other."""
    from pydantic import AfterValidator

    def checked(name: str) -> str:
        problem = entries.problem(name)
        if problem is not None:
            raise ValueError(problem)
        return name

    return Annotated[str, AfterValidator(checked)]


def _listed(value: Any, hint: Any) -> Any:
    """Take a lone string as a list of one where a list is expected."""
    wants_list = "tuple" in str(hint)
    return [value] if wants_list and isinstance(value, str) else value
