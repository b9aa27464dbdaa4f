"""SHA-256 of whole files, remembered by place, size and times, so that a large one is read once."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

from graft.errors import GraftError
from graft.files.read import open_regular, read_json
from graft.files.write import write_json

_REMEMBERED = 1000
_SETTLED = 2.0
"""Seconds since a file's last change, below which another one might not show in its times."""


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a regular file's bytes, 64 hexadecimal digits.

    A file that is the same one in place, size and times of change as when it was last read is not
    read again. Raises GraftError when it cannot be read.
    """
    with open_regular(path) as file:
        about = os.fstat(file.fileno())
        times = (about.st_mtime_ns, about.st_ctime_ns)
        key = ":".join(map(str, (about.st_dev, about.st_ino, about.st_size, *times)))
        remembered = _remembered()
        if isinstance(found := remembered.get(key), str) and len(found) == 64:
            return found
        try:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise GraftError(f"{path} cannot be read: {error.strerror}") from error
        after = os.fstat(file.fileno())
    if (after.st_mtime_ns, after.st_ctime_ns) == times and time.time_ns() - max(times) > (
        _SETTLED * 1e9
    ):
        _remember(remembered, key, digest)
    return digest


def check_digest(path: Path, expected: str) -> None:
    """Raise GraftError when a file's bytes are not those that its writer noted."""
    if (found := file_digest(path)) != expected:
        raise GraftError(
            f"{path} is damaged or was changed since it was written: its SHA-256 is "
            f"{found[:16]}..., expected {expected[:16]}...; restore it from a copy, or make it anew"
        )


def cache_folder() -> Path:
    """Return the folder of what graft may make anew: GRAFT_CACHE, or graft in the user's cache."""
    if own := os.environ.get("GRAFT_CACHE"):
        return Path(own).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(cache) / "graft"


def _memory() -> Path:
    return cache_folder() / "digests.json"


def _remembered() -> dict[str, object]:
    """Return what is remembered; a file of it that is damaged is none."""
    try:
        return read_json(_memory())
    except GraftError:
        return {}


def _remember(remembered: dict[str, object], key: str, digest: str) -> None:
    kept = [*remembered.items()][1 - _REMEMBERED :]
    try:
        write_json(_memory(), dict([*kept, (key, digest)]))
    except GraftError:
        return  # without a place to remember, the file is read again next time
