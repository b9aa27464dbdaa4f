"""The shim's record: every operation that changed a watched folder, in order, with its data."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

_ENTRY = struct.Struct("<IIQQqQII")  # struct entry of shim.c
_CHECKPOINT = re.compile(r"/checkpoints/step-\d+$")
CREATED, EMPTIED = 1, 2


class Kind(IntEnum):
    """What an operation is; the numbers are those of shim.c."""

    OPEN = 1
    WRITE = 2
    RENAME = 3
    LINK = 4
    SYMLINK = 5
    UNLINK = 6
    RMDIR = 7
    MKDIR = 8
    TRUNCATE = 9
    FSYNC = 10
    SYNC = 11


@dataclass(frozen=True)
class Operation:
    """One operation that succeeded."""

    kind: Kind
    number: int
    """As they are counted, those that failed among them, from 1."""
    flags: int
    """Of OPEN: CREATED where the file was not there before, EMPTIED where it was cut to nothing."""
    inode: int
    offset: int
    """Of WRITE where it began, of TRUNCATE the new size."""
    path: str
    """Of RENAME and LINK the old name, of SYMLINK what it points to."""
    other: str
    """Of RENAME, LINK and SYMLINK the new name."""
    data: bytes

    def __str__(self) -> str:
        names = " -> ".join(name for name in (self.path, self.other) if name)
        return f"{self.kind.name.lower()} {names}"


def read_record(path: Path) -> list[Operation]:
    """Return the operations of a record."""
    return list(_operations(path.read_bytes()))


def _operations(record: bytes) -> Iterator[Operation]:
    at = 0

    def take(size: int) -> bytes:
        nonlocal at
        at += size
        return record[at - size : at]

    while at < len(record):
        kind, flags, number, inode, offset, size, first, second = _ENTRY.unpack(take(_ENTRY.size))
        path, other = take(first).decode(), take(second).decode()
        data = take(size) if kind == Kind.WRITE else b""
        yield Operation(Kind(kind), number, flags, inode, offset, path, other, data)


def checkpoints_before(operations: Sequence[Operation], at: int) -> list[str]:
    """Return the names of the checkpoints that were saved before operation number `at`.

    One is saved when an operation that is no flush follows the renaming of its folder.
    """
    names: list[str] = []
    pending: str | None = None
    for operation in operations:
        if operation.number >= at:
            break
        if pending is not None and operation.kind not in (Kind.FSYNC, Kind.SYNC):
            names.append(pending)
            pending = None
        if operation.kind == Kind.RENAME and _CHECKPOINT.search(operation.other):
            pending = Path(operation.other).name
    return names
