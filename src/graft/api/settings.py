"""YAML configuration files: the same keys as the flags, checked strictly."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from graft.errors import did_you_mean, raise_problems


def checked_settings(values: Mapping[str, Any], kind: type, where: str) -> dict[str, Any]:
    """Return settings converted to the types of the dataclass `kind`.

    Raises GraftError with every unknown key, with a suggestion, and every value of a wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = get_type_hints(kind)
    problems, checked = [], {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            problems.append(f"unknown key {key!r}{did_you_mean(name, fields)}")
            continue
        try:
            checked[name] = TypeAdapter(hints[name]).validate_python(_listed(value, hints[name]))
        except ValidationError as error:
            reasons = "; ".join(detail["msg"] for detail in error.errors()[:1])
            problems.append(f"{key} is {value!r}: {reasons}")
    raise_problems(problems, where)
    return checked


def _listed(value: Any, hint: Any) -> Any:
    """Take a lone string as a list of one where a list is expected."""
    wants_list = "tuple" in str(hint)
    return [value] if wants_list and isinstance(value, str) else value
