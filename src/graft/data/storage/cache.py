"""Encoded rows that are kept between commands: what was encoded once is mapped the next time.

An entry is a folder of its own, whose name is the digest of all that its examples depend on. Only
what is whole is read: the file has the digest that its writer noted, and the folder belongs to
this user alone. Anything else is made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.data.config import DataConfig
from graft.data.rows import Reading
from graft.data.shapes.base import Holds, Tokenizer
from graft.data.sources.places import sources_of
from graft.data.storage.store import Stored, write_batches
from graft.errors import GraftError
from graft.files.bounds import bound
from graft.files.digest import cache_folder, check_digest, file_digest
from graft.files.read import open_regular, read_bytes, read_typed
from graft.files.write import remove_folder, shared_folder, write_json

if TYPE_CHECKING:
    import pyarrow as pa

CACHE_BYTES = 32 * 2**30
"""What all entries may take; those that were used longest ago go first."""

NO_MATTER = frozenset({"data", "eval_data", "eval_fraction", "deduplicate", "cache"})
"""Options that change no example of a file; any other is part of its entry's name."""

_ROWS, _ABOUT = "rows.arrow", "about.json"
_NAME = 32
"""Hexadecimal digits of a key that name its folder."""


@dataclass(frozen=True)
class About:
    """What is noted of an entry."""

    key: str
    digest: str
    """SHA-256 of the file of examples."""
    facts: dict[str, Any]
    """What whoever made it noted."""
    seal: str = ""
    """SHA-256 of the rest."""

    def sealed(self) -> About:
        """Return it with its seal."""
        words = json.dumps([self.key, self.digest, self.facts], sort_keys=True)
        return replace(self, seal=hashlib.sha256(words.encode()).hexdigest())


def entry_key(
    path: str,
    tokenizer: Tokenizer,
    config: DataConfig,
    max_length: int,
    holds: tuple[Holds, ...] = ("answers",),
) -> tuple[str, ...]:
    """Return what the examples of --data or --eval-data depend on, in words and digests.

    Raises GraftError when it cannot be read.
    """
    reading = Reading.of(path, config, holds)
    options = {one.name: getattr(config, one.name) for one in fields(DataConfig)}
    options = {name: value for name, value in options.items() if name not in NO_MATTER}
    template = json.dumps(tokenizer.chat_template, default=repr, sort_keys=True)
    return (
        content_key(path, reading),
        _tokenizer_digest(tokenizer),
        template,
        # What day it is may be in what a template writes.
        str(date.today()) if "strftime_now" in template else "",
        json.dumps(options | {"max_length": max_length}, default=repr, sort_keys=True),
        repr(reading),
        _code_digest(),
    )


def content_key(path: str, reading: Reading) -> str:
    """Return what is read of each source, in their order: the first part of an entry's key."""
    found: list[list[object]] = []
    for source in sources_of(path, reading.columns, reading.data_format):
        # Rows of a single file stand in the file that is asked for, whatever that is called.
        name = "" if source.name == path else source.name
        suffixes = "".join(Path(source.name).suffixes[-2:]).lower()
        about = [name, suffixes, source.digest(), source.columns, source.data_format]
        found.append([*about, source.is_mixed])
    return json.dumps(found)


def _tokenizer_digest(tokenizer: Tokenizer) -> str:
    backend = tokenizer.backend_tokenizer
    told = json.loads(backend.to_str())
    told.update(truncation=None, padding=None)  # which encoding takes away
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    words = [told, special, backend.encode_special_tokens, type(tokenizer).__name__]
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()


@cache
def _code_digest() -> str:
    """Return a digest of all code that makes examples of rows, this package and others."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(read_bytes(path))
    for name in ("graft-llm", "jinja2", "numpy", "pyarrow", "tokenizers", "transformers"):
        with suppress(ModuleNotFoundError):
            digest.update(f"{name} {version(name)}".encode())
    return digest.hexdigest()


def recall(
    key: tuple[str, ...], path: str, note: Callable[[str], None]
) -> tuple[Stored, dict[str, Any]] | None:
    """Return the examples of an entry and what was noted of it; None where there is none.

    path: the data file as it is called now. note: takes why an entry that is there is not read.
    """
    name = _name(key)
    entry = _folder() / name[:_NAME]
    try:
        about = os.lstat(entry)
    except OSError:
        return None
    if about.st_uid != os.geteuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        note(f"{entry} is not read, as others than you could have written it")
        return None
    try:
        noted = read_typed(entry / _ABOUT, About)
        if noted.key != name or noted != noted.sealed():
            raise GraftError(f"{entry / _ABOUT} is damaged, or of other rows")
        check_digest(entry / _ROWS, noted.digest)
        with open_regular(entry / _ROWS) as file:
            stored = Stored(file, path)
        os.utime(entry)
    # pyarrow raises many kinds; a file that has its digest is one that graft wrote.
    except (GraftError, OSError, ValueError) as error:
        note(f"the rows that were encoded before are encoded anew: {error}")
        with suppress(GraftError):
            remove_folder(entry)
        return None
    return stored, noted.facts


def keep(
    key: tuple[str, ...],
    path: str,
    batches: Iterable[pa.RecordBatch],
    facts: Callable[[], Mapping[str, Any]],
) -> Stored:
    """Write batches as an entry; return its examples.

    facts: asked for at the end, what is to be noted, as JSON has it. Raises GraftError, with the
    OSError as its cause, when the entry cannot be written.
    """
    name = _name(key)
    with shared_folder(_folder() / name[:_NAME]) as folder:
        write_batches(folder / _ROWS, batches)
        with open_regular(folder / _ROWS) as file:
            stored = Stored(file, path)
        noted = json.loads(json.dumps(facts()))
        about = About(name, file_digest(folder / _ROWS), noted).sealed()
        write_json(folder / _ABOUT, asdict(about))
    _trim()
    return stored


def _folder() -> Path:
    return cache_folder() / "encoded"


def _name(key: tuple[str, ...]) -> str:
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()


def _trim() -> None:
    """Remove entries, those first that were used longest ago, until all have room."""
    entries: list[tuple[float, int, Path]] = []
    with suppress(OSError):
        for entry in _folder().iterdir():
            with suppress(OSError):
                size = sum(file.stat().st_size for file in entry.iterdir())
                entries.append((entry.stat().st_mtime, size, entry))
    total = 0
    for used, size, entry in sorted(entries, reverse=True):
        total += size
        if total > bound(CACHE_BYTES) and time.time() - used > 60:
            with suppress(GraftError):
                remove_folder(entry)
