"""YAML configuration files: the same keys as the flags, checked strictly."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from graft.errors import GraftError, did_you_mean, raise_problems


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; raises GraftError when it holds none."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise GraftError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise GraftError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(value, dict):
        raise GraftError(f"{path} holds no settings; expected lines of 'key: value'")
    return value


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


def write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    """Write settings to a temporary name, then rename."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(yaml.safe_dump(dict(values), sort_keys=False), encoding="utf-8")
    os.replace(temporary, path)


def _listed(value: Any, hint: Any) -> Any:
    """Take a lone string as a list of one where a list is expected."""
    wants_list = "tuple" in str(hint)
    return [value] if wants_list and isinstance(value, str) else value
