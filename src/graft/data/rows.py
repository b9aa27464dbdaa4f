"""Rows: which of the four kinds a row is, and whether it is complete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from graft.data.sources.files import Record, read_records
from graft.errors import GraftError, raise_problems

RowKind = Literal["text", "prompt", "instruction", "messages"]

REQUIRED_KEYS: dict[RowKind, tuple[str, ...]] = {
    "text": ("text",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "messages": ("messages",),
}
OPTIONAL_KEYS: dict[RowKind, tuple[str, ...]] = {"instruction": ("input",)}
# Values that may be empty: nothing in them is trained.
_MAY_BE_EMPTY = ("prompt",)
_ACCEPTED = (
    "accepted keys of a row: text; or prompt, completion; or instruction, output "
    "and perhaps input; or messages"
)
_MOST_LISTED = 20


@dataclass(frozen=True)
class Row:
    """A checked row: where it stands and the values of its kind's keys."""

    where: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Rows:
    """All rows of a file: one kind, at least one row, and the keys that nobody reads."""

    kind: RowKind
    rows: list[Row]
    ignored_keys: tuple[str, ...]


def read_rows(path: str | Path) -> Rows:
    """Read and check a file of examples.

    Raises GraftError that lists every bad row with file and line: unreadable rows, wrong
    keys, missing or empty values, and rows of another kind than the file's first good row.
    """
    records = read_records(path)
    problems = list(records.problems)
    rows: list[Row] = []
    ignored: set[str] = set()
    kind: RowKind | None = None
    first = ""
    for record in records.rows:
        found = _kind_of(record, problems)
        if found is None or not isinstance(record.value, Mapping):
            continue
        if kind is None:
            kind, first = found, record.where
        if found != kind:
            problems.append(
                f"{record.where}: {_a(found)} row, but {first} is {_a(kind)} row; "
                "a file holds one kind of rows, so split it"
            )
            continue
        known = REQUIRED_KEYS[kind] + OPTIONAL_KEYS.get(kind, ())
        ignored.update(str(key) for key in record.value if key not in known)
        rows.append(_checked(record, record.value, kind, problems))
    raise_row_problems(problems, f"{path}: bad rows")
    assert kind is not None  # no problems and at least one record: some row had a kind
    return Rows(kind, rows, tuple(sorted(ignored)))


def raise_row_problems(problems: Sequence[str], heading: str) -> None:
    """Raise one GraftError that counts all problems and lists the first twenty."""
    more = len(problems) - _MOST_LISTED
    if more <= 0:
        raise_problems(problems, heading)
        return
    lines = "\n".join(f"  - {problem}" for problem in problems[:_MOST_LISTED])
    raise GraftError(f"{heading}: {len(problems)} problems\n{lines}\n  and {more} more")


def message_problems(messages: object) -> list[str]:
    """Return what keeps a value from being a list of messages, each with role and content."""
    if not isinstance(messages, list):
        return [f"'messages' is {_name(messages)}; expected a list of objects"]
    if not messages:
        return ["'messages' is an empty list; expected at least one message"]
    problems = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            problems.append(f"message {number} is {_name(message)}; expected an object")
            continue
        for key in ("role", "content"):
            if key not in message:
                keys = ", ".join(map(str, message)) or "none"
                problems.append(f"message {number}: {key!r} is missing (keys: {keys})")
            elif wrong := _text_problem(message[key]):
                problems.append(f"message {number}: {key!r} {wrong}")
        content = message.get("content")
        if message.get("role") == "assistant" and isinstance(content, str) and not content.strip():
            problems.append(f"message {number}: the assistant's content is empty")
    return problems


def _kind_of(record: Record, problems: list[str]) -> RowKind | None:
    if not isinstance(record.value, Mapping):
        problems.append(f"{record.where}: {_name(record.value)}; expected an object; {_ACCEPTED}")
        return None
    kinds = [
        kind for kind, keys in REQUIRED_KEYS.items() if all(key in record.value for key in keys)
    ]
    found = ", ".join(map(str, record.value)) or "none"
    if len(kinds) == 1:
        return kinds[0]
    if kinds:
        problems.append(
            f"{record.where}: found keys {found}, which fit {' and '.join(kinds)} rows alike; "
            "remove the keys of all kinds but one"
        )
    else:
        problems.append(f"{record.where}: found keys {found}; {_ACCEPTED}")
    return None


def _checked(record: Record, value: Mapping[str, Any], kind: RowKind, problems: list[str]) -> Row:
    if kind == "messages":
        found = message_problems(value["messages"])
        if not found:
            found = _answer_problems([message["role"] for message in value["messages"]])
        problems.extend(f"{record.where}: {text}" for text in found)
        return Row(record.where, {"messages": value["messages"]})
    fields: dict[str, Any] = {key: value[key] for key in REQUIRED_KEYS[kind]}
    for key, content in fields.items():
        if wrong := _text_problem(content):
            problems.append(f"{record.where}: {key!r} {wrong}")
        elif not content.strip() and key not in _MAY_BE_EMPTY:
            problems.append(f"{record.where}: {key!r} is empty")
    for key in OPTIONAL_KEYS.get(kind, ()):
        content = value.get(key)
        fields[key] = "" if content is None else content
        if wrong := _text_problem(fields[key]):
            problems.append(f"{record.where}: {key!r} {wrong}")
    return Row(record.where, fields)


def _answer_problems(roles: Sequence[str]) -> list[str]:
    if "assistant" not in roles:
        return [f"no message of role 'assistant' (roles: {', '.join(roles)}), so nothing to train"]
    if roles[0] == "assistant":
        return [
            "message 1: the assistant speaks first, with nothing to answer; "
            "put a user's message before it, or remove it"
        ]
    return []


def _a(kind: RowKind) -> str:
    return f"an {kind}" if kind == "instruction" else f"a {kind}"


def _text_problem(value: object) -> str | None:
    """Return what keeps a value from being a text that a tokenizer can read."""
    if not isinstance(value, str):
        return f"is {_name(value)}; expected a string"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = ascii(value[error.start])
        return f"holds half of a surrogate pair ({half} at character {error.start}); remove it"
    return None


def _name(value: object) -> str:
    if value is None:
        return "null"
    names: dict[type, str] = {str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), f"of type {type(value).__name__}")
