"""Reading small files that may come from anywhere: bounded, regular files only, typed."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from graft.errors import GraftError, raise_problems
from graft.files.bounds import bound, raise_beyond
from graft.text import printable, quoted

if TYPE_CHECKING:
    import yaml

Kind = TypeVar("Kind")

_HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""Begins one of the two escapes of a character beyond the first 65,536."""

_MIB = 2**20
JSON_BYTES = 16 * _MIB
"""Each byte of JSON may become 16 of memory."""
LARGE_JSON_BYTES = 64 * _MIB
"""Of what has an entry for each word or tensor: a tokenizer of 256,000 words takes 33 MiB."""
YAML_BYTES = 256 * 2**10
YAML_NODES = 10_000
"""Values of a YAML file, each counted as often as anchors repeat it."""


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading, without waiting for a pipe or reading a device for ever.

    Raises GraftError when it is not there, cannot be read, or is anything else than a file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise GraftError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # a zero byte in the name
        raise GraftError(f"{quoted(str(path))} is no name of a file: {error}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise GraftError(f"{path} is no regular file, but a folder, a pipe or a device")
    return os.fdopen(descriptor, "rb")


def unread(error: GraftError) -> OSError | None:
    """Return why the system did not read a file; None where it is missing or damaged."""
    cause = error.__cause__
    lost = isinstance(cause, FileNotFoundError)
    return cause if isinstance(cause, OSError) and not lost else None


@contextmanager
def passing_damage() -> Iterator[None]:
    """Leave the block at a file that is missing or damaged.

    Raises the GraftError of one that the system did not read: it may be whole all the same.
    """
    try:
        yield
    except GraftError as error:
        if unread(error) is not None:
            raise


def read_bytes(path: Path, most: int = JSON_BYTES) -> bytes:
    """Return a file's bytes; raises GraftError for more than `most` of them; see `open_regular`."""
    most = bound(most)
    try:
        with open_regular(path) as file:
            content = file.read(most + 1)
    except OSError as error:
        raise GraftError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > most:
        raise_beyond(path, f"more than {most:,} bytes", f"{most:,}")
    return content


def read_text(path: Path, most: int = JSON_BYTES) -> str:
    """Return a UTF-8 file's text; see `read_bytes`."""
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise GraftError(f"{path} is no UTF-8 text: {error.reason}, byte {error.start}") from error


def read_json(path: Path, most: int = JSON_BYTES) -> dict[str, Any]:
    """Return the JSON object in a file; raises GraftError when it holds none; see `read_bytes`."""
    text = read_text(path, most)
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise GraftError(f"{path} is no valid JSON: it is nested too deeply") from error
    except ValueError as error:
        raise GraftError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise GraftError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    if _HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:  # which nothing could write again
            raise GraftError(f"{path} holds half a character: {error.reason}") from error
    return value


def read_typed(path: Path, kind: type[Kind], most: int = JSON_BYTES) -> Kind:
    """Return the JSON object in a file as a dataclass, every field checked for its type.

    Keys that the dataclass does not name are left out. Raises GraftError with every field that is
    missing or of another type.
    """
    return typed(read_json(path, most), kind, path)


def typed(value: object, kind: type[Kind], where: object) -> Kind:
    """Return plain JSON values as a dataclass; see `read_typed`. `where` heads the message."""
    from pydantic import TypeAdapter, ValidationError  # and not above: not every command reads

    try:
        # By way of JSON: there a list may stand for a tuple, and strictly so.
        return TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        problems = [
            f"{_place(one['loc'])} is {quoted(one['input'])}: {one['msg']}"
            if one["type"] != "missing"
            else f"{_place(one['loc'])} is missing"
            for one in error.errors(include_url=False)[:5]
        ]
        raise_problems(problems, f"{where} is damaged, or from another version of graft")
        raise


def _place(parts: Iterable[object]) -> str:
    """Return where in a value something is, as in 'a.b.0'; a key may be anything."""
    return printable(".".join(str(part)[:50] for part in parts)) or "it"


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; raises GraftError when it holds none."""
    value = parse_yaml(read_text(path, YAML_BYTES), path)
    if not isinstance(value, dict):
        raise GraftError(f"{path} holds no settings; expected lines of 'key: value'")
    return value


def parse_yaml(text: str, path: Path) -> Any:
    """Return the value of a YAML text from `path`; raises GraftError when it is none, or too large.

    None for an empty text.
    """
    import yaml  # which not every command needs

    try:
        loader = _yaml_loader()(text)
        try:
            node = loader.get_single_node()
            _check_nodes(node, path)
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise GraftError(f"{path} is no valid YAML: {str(error)[:500]}") from error
    except RecursionError as error:
        raise GraftError(f"{path} is no valid YAML: it is nested too deeply") from error
    except (ValueError, TypeError, OverflowError, AttributeError) as error:  # no date, no number
        raise GraftError(f"{path} is no valid YAML: {str(error)[:500]}") from error


@cache
def _yaml_loader() -> type[yaml.SafeLoader]:
    """Return a loader without numbers to base 60, such as 1:30, whose reading is quadratic."""
    import yaml

    class Loader(yaml.SafeLoader):
        def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
            tag = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
            is_text = kind is yaml.ScalarNode and ":" in value and tag in numbers
            return self.DEFAULT_SCALAR_TAG if is_text else tag

    def refuse(loader: Loader, node: yaml.ScalarNode) -> Any:
        if ":" in loader.construct_scalar(node):
            raise yaml.constructor.ConstructorError(
                None, None, "a number to base 60", node.start_mark
            )
        return numbers[node.tag](loader, node)

    kinds = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
    numbers = {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in kinds}
    for tag in kinds:
        Loader.add_constructor(tag, refuse)
    return Loader


def _check_nodes(root: Any, path: Path) -> None:
    """Raise GraftError when anchors repeat values beyond the bound, or hold themselves."""
    import yaml

    counts: dict[int, int] = {}

    def count(node: Any) -> int:
        if id(node) in counts:
            return counts[id(node)]
        counts[id(node)] = bound(YAML_NODES) + 1  # of one that holds itself
        parts: list[Any] = []
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        counts[id(node)] = 1 + sum(map(count, parts))
        return counts[id(node)]

    if root is not None and (found := count(root)) > bound(YAML_NODES):
        raise_beyond(path, f"{found:,} values, repeated by anchors", f"{bound(YAML_NODES):,}")
