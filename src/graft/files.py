"""Files that are written whole or not at all, and small ones that are read: JSON, YAML."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graft.errors import GraftError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, which becomes it when the block ends.

    When the block fails nothing is left, and a file that was there before is as it was. Raises
    GraftError when it cannot be written.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise GraftError(_unwritable(path, error)) from error


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends, and vanishes if it fails.

    Raises GraftError when `path` exists with something in it or cannot be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise GraftError(f"{path} exists already; choose another name or remove it")
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        if path.exists():
            path.rmdir()
        os.replace(temporary, path)
    except OSError as error:
        raise GraftError(_unwritable(path, error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unwritable(path: Path, error: OSError) -> str:
    return (
        f"{path} cannot be written: {error.strerror or error}; free some space or choose another "
        "place with --out"
    )


def write_text(path: Path, text: str) -> None:
    """Write a text file; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write a JSON file; see `replacing`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    """Write settings as YAML; see `replacing`."""
    import yaml  # which not every command needs

    write_text(path, yaml.safe_dump(dict(values), sort_keys=False))


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raises GraftError when it holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GraftError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise GraftError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise GraftError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; raises GraftError when it holds none."""
    import yaml

    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise GraftError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise GraftError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(value, dict):
        raise GraftError(f"{path} holds no settings; expected lines of 'key: value'")
    return value
