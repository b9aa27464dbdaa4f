"""Files and folders that are written whole and for good, or not at all.

Everything goes to a new name beside its place, is flushed to the disk, renamed, and the folder
flushed: after a kill or a loss of power there is the old or the new content, never a part. The
temporary name is unique, opened so that no link is followed, and locked while its writer lives, so
that what a killed process left is known and swept away by the next write of the same name.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from graft.errors import GraftError

_SUFFIX = ".part"
_LONGEST = 200
"""Bytes of a name that are kept in its temporary one; a name has at most 255."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, which becomes it when the block ends.

    When the block fails nothing is left, and a file that was there before is as it was. Folders
    above are made. Raises GraftError when it cannot be written.
    """
    try:
        make_folders(path.parent)
        temporary, lock = _reserved(path, folder=False)
        try:
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(lock)
    except OSError as error:
        raise unwritable(path, error) from error


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends, and vanishes if it fails.

    Raises GraftError when `path` exists with something in it, when another process is writing it,
    or when it cannot be written.
    """
    check_new(path)
    with scratch_folder(path) as temporary:
        yield temporary
        flush_folder(temporary)
        _publish(temporary, path)
        _flush(path.parent)


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield where to write `path`, in a temporary folder; all that is in it goes beside `path`.

    `path` itself goes last: once it is there, so is what belongs to it. Raises as `new_folder`.
    """
    check_new(path)
    with scratch_folder(path) as temporary:
        yield temporary / path.name
        flush_folder(temporary)
        for name in sorted(os.listdir(temporary)):
            if name != path.name:
                os.replace(temporary / name, path.with_name(name))
        _publish(temporary / path.name, path)
        _flush(path.parent)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, which vanishes when the block ends.

    Raises GraftError when another process has one for the same path, or when the block cannot write
    what it writes.
    """
    try:
        make_folders(path.parent)
        if writers := sweep(path.parent, path.name):
            raise GraftError(f"{path} is being written by another process ({writers[0]})")
        temporary, lock = _reserved(path, folder=True)
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(lock)
    except OSError as error:
        raise unwritable(path, error) from error


@contextmanager
def shared_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends, unless one is there then.

    It is for what several processes may make at a time, each the same, and nobody else reads. What
    a loss of power leaves of it may be damaged. Raises GraftError when it cannot be written.
    """
    try:
        make_folders(path.parent)
        sweep(path.parent)
        temporary, lock = _reserved(path, folder=True)
        try:
            temporary.chmod(0o700)
            yield temporary
            try:
                os.rename(temporary, path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(lock)
    except OSError as error:
        raise unwritable(path, error) from error


def _publish(temporary: Path, path: Path) -> None:
    """Rename; raises GraftError when something has appeared at `path` meanwhile."""
    check_new(path)
    try:
        os.rename(temporary, path)
    except OSError:
        check_new(path)
        raise


def check_new(path: Path) -> None:
    """Raise GraftError when there is something at `path`; an empty folder is nothing.

    What killed writers of it left is swept away.
    """
    try:
        sweep(path.parent, path.name)
        is_there = os.path.lexists(path) and not _is_empty(path)
    except OSError as error:
        raise unwritable(path, error) from error
    if is_there:
        raise GraftError(f"{path} exists already; choose another name or remove it")


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def remove_folder(path: Path) -> None:
    """Remove a folder, which is there whole or not at all at every moment; nothing if not there.

    Raises GraftError when it cannot be removed.
    """
    try:
        if not path.is_dir() or path.is_symlink():
            path.unlink(missing_ok=True)
            return
        aside = _temporary_name(path)
        os.rename(path, aside)
        _flush(path.parent)
        shutil.rmtree(aside)
    except OSError as error:
        raise GraftError(f"{path} cannot be removed: {error.strerror or error}") from error


def make_folders(path: Path) -> None:
    """Make a folder and those above it, for good; nothing where it is there."""
    if path.is_dir():
        return
    make_folders(path.parent)
    path.mkdir(exist_ok=True)
    _flush(path.parent)


def sweep(folder: Path, name: str | None = None) -> list[str]:
    """Remove temporary files and folders whose writer is gone; return the others' names.

    name: that of the file or folder that they were to become, by default any.
    """
    living: list[str] = []
    if not folder.is_dir():
        return living
    for path in folder.glob(f".*{_SUFFIX}"):
        kept, _, token = path.name.removesuffix(_SUFFIX).rpartition(".")
        if len(token) != _TOKEN or (name is not None and kept != _hidden(name)):
            continue
        with suppress(OSError):  # gone meanwhile, another user's, or without locks
            lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if not _lock(lock):
                    living.append(path.name)
                elif stat.S_ISDIR(os.fstat(lock).st_mode):
                    shutil.rmtree(path)
                else:
                    path.unlink()
            finally:
                os.close(lock)
    return living


def flush_folder(folder: Path) -> None:
    """Flush every file and folder in a folder, and itself, to the disk."""
    for root, _, files in os.walk(folder, topdown=False):
        for file in files:
            _flush(Path(root, file))
        _flush(Path(root))


def flush(path: Path) -> None:
    """Flush a file that grows to the disk; raises GraftError when that fails."""
    try:
        _flush(path)
    except OSError as error:
        raise unwritable(path, error) from error


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


def unwritable(path: Path, error: OSError) -> GraftError:
    """Return what to raise when a file or folder cannot be written."""
    advice = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "; free some space or choose another place with --out"
    elif error.errno in _PLACES:
        advice = "; choose another place with --out"
    return GraftError(f"{path} cannot be written: {error.strerror or error}{advice}")


_PLACES = (
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
    *(errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP),
)
"""Errors of a place, which is another one elsewhere."""


_TOKEN = 12
"""Characters that make a temporary name unique, and not to be guessed."""


def _temporary_name(path: Path) -> Path:
    token = secrets.token_hex(_TOKEN // 2)
    return path.with_name(f"{_hidden(path.name)}.{token}{_SUFFIX}")


def _hidden(name: str) -> str:
    return "." + os.fsdecode(os.fsencode(name)[:_LONGEST])


def _reserved(path: Path, folder: bool) -> tuple[Path, int]:
    """Make a new file or folder beside `path`; return its name, and the descriptor that locks it.

    What killed writers of the same name left is swept away.
    """
    sweep(path.parent, path.name)
    while True:
        temporary = _temporary_name(path)
        if folder:
            temporary.mkdir()
            flags = os.O_RDONLY | os.O_DIRECTORY
        else:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        lock = os.open(temporary, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with suppress(OSError):  # without locks nothing is known to be stale, and nothing swept
            _lock(lock)
        # Another's sweep may have come between the two lines above.
        if temporary.exists():
            return temporary, lock
        os.close(lock)


def _lock(descriptor: int) -> bool:
    """Lock an open file for as long as it is open; return whether nobody else holds it.

    Raises OSError where the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _flush(path: Path) -> None:
    """Flush a file's data, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot flush a folder: they say so by one of these.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not stat.S_ISDIR(
            os.fstat(descriptor).st_mode
        ):
            raise
    finally:
        os.close(descriptor)
