"""One owner at a time for a folder that a command works in."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from graft.errors import GraftError
from graft.files.write import unwritable
from graft.text import quoted

LOCK = ".lock"
_LONGEST = 4096
"""Bytes of a lock file that are read."""


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Own an existing folder while the block runs; the system frees it when the process ends.

    Raises GraftError that names the owner when another process, or another block of this one, has
    it. What is in the lock file is for people; the system's lock on it decides, so a killed owner
    leaves nothing that could be taken for a living one. On a file system without locks the process
    that the file names decides: one that has ended on this machine owns nothing.
    """
    path = folder / LOCK
    try:
        lock = _opened(path)
        _identify(lock)
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        yield
    finally:
        # While it is still held. On a disk that fails meanwhile it stays, and locks nobody out.
        with suppress(OSError):
            path.unlink()
        os.close(lock)


def is_owned(folder: Path) -> bool:
    """Return whether a process owns a folder now."""
    try:
        lock = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return _held(lock, fcntl.LOCK_SH)
    finally:
        os.close(lock)


def _opened(path: Path) -> int:
    """Return a locked descriptor of the lock file; raises GraftError when it is held."""
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open(path, flags, 0o666)
        if _held(lock, fcntl.LOCK_EX):
            owner = _owner(lock)
            os.close(lock)
            raise GraftError(
                f"{path.parent} is in use by {owner}; wait until it has ended, or stop it"
            )
        # Its owner may have removed it between the two calls: then it is locked, but not there.
        if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
            return lock
        os.close(lock)


def _held(lock: int, kind: int) -> bool:
    """Lock the file for as long as it is open; return whether another has it."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no locks here
        return _lives(lock)
    return False


def _lives(lock: int) -> bool:
    """Return whether the process that the lock file names may be at work."""
    try:
        owner = json.loads(os.pread(lock, _LONGEST, 0))
        process, host = int(owner["process"]), owner["host"]
        if host == socket.gethostname():
            os.kill(process, 0)
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return False  # no such process, or nobody is named
    return True


def _identify(lock: int) -> None:
    owner = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]]),
    }
    os.ftruncate(lock, 0)
    os.pwrite(lock, (json.dumps(owner) + "\n").encode(), 0)


def _owner(lock: int) -> str:
    try:
        owner = json.loads(os.pread(lock, _LONGEST, 0))
        return (
            f"process {int(owner['process'])} on {quoted(owner['host'])} "
            f"({quoted(owner['command'])}, since {quoted(owner['since'])})"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
