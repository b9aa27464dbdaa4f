"""Data files, read and encoded: few rows in this process, many in several and into a file."""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from graft.data.config import DataConfig
from graft.data.encode import EncodedData, Encoding, RowEncoder, bad_rows
from graft.data.examples import Example
from graft.data.rows import Reading, Row, RowStream
from graft.data.shapes.base import Holds, Tokenizer
from graft.data.sources.hub import HUB
from graft.data.sources.places import sources_of
from graft.data.storage.cache import content_key, entry_key, keep, recall
from graft.data.storage.pool import Pool, cores
from graft.data.storage.store import Stored, packed, write_batches
from graft.data.templates import placeholder, rendering, rendering_here
from graft.errors import GraftError
from graft.files.digest import cache_folder

if TYPE_CHECKING:
    import pyarrow as pa

FEW_ROWS = 4096
"""Rows that one process encodes before others could have begun, and that are kept in memory."""
FEW_BYTES = 4 * 2**20
"""Bytes of rows for which the same holds."""
_SMALL_FILE = 2**18
"""Bytes of a data file that is encoded sooner than the cache is looked through."""
_LOT_ROWS = 256
_LOT_BYTES = 2**18
_LONGEST_SENT = 2**20
"""Bytes of a lot that a process is given, whose memory is bounded; this one takes longer rows."""
_MOST_PROCESSES = 16
"""More would wait for this one, which reads the rows for all."""


class Listener(Protocol):
    """Who is told what happens meanwhile."""

    def note(self, text: str) -> None:
        """Take a sentence that the user should read."""

    def progress(self, stage: str, done: int, total: int) -> None:
        """Take how many rows are done, and about how many there are."""


class _Silent:
    def note(self, text: str) -> None:
        pass

    def progress(self, stage: str, done: int, total: int) -> None:
        pass


@dataclass(frozen=True)
class _Lot:
    """Some rows, and what of them a process is sent; None where they are not for others."""

    rows: list[Row]
    request: bytes | None
    bytes: int


def encoded_file(
    path: str,
    tokenizer: Tokenizer,
    config: DataConfig,
    max_length: int,
    listener: Listener | None = None,
    holds: tuple[Holds, ...] = ("answers",),
) -> EncodedData:
    """Read, check and encode a data file, or map what an earlier call has kept of it.

    holds: what there is to learn from its rows.

    Raises GraftError that lists every bad row with file and line.
    """
    told = listener or _Silent()
    name = str(Path(path))
    key = None
    # Which rows are skipped is not kept.
    reading = Reading.of(path, config, holds)
    if config.cache and not config.skip_bad_rows and _size(path, reading) > _SMALL_FILE:
        key = entry_key(path, tokenizer, config, max_length, holds)
        if (found := recall(key, name, told.note)) is not None:
            return _data(*found)
    work = _Work(path, reading, tokenizer, config, max_length, told)
    if not work.is_large:
        return work.in_memory()
    if key is not None:
        try:
            return work.data(keep(key, name, work.batches(), partial(work.noted_of, key[0])))
        except GraftError as error:
            if not isinstance(cause := error.__cause__, OSError):
                raise
            told.note(
                f"the encoded rows are not kept for another time, as {cache_folder()} cannot be "
                f"written: {cause.strerror}; name another folder in the variable GRAFT_CACHE"
            )
            work = _Work(path, reading, tokenizer, config, max_length, told)
    try:
        with tempfile.TemporaryFile() as file:
            write_batches(file, work.batches())
            return work.data(Stored(file, name))
    except OSError as error:
        raise GraftError(
            f"{tempfile.gettempdir()}: no room for the encoded rows of {path}: {error.strerror}; "
            "free some space, or name another folder in the variable TMPDIR"
        ) from error


def _size(path: str, reading: Reading) -> int:
    """Return the bytes of all files that are read; of data of the hub some.

    0 for what cannot be read, which its reader will tell.
    """
    try:
        sources = sources_of(path, reading.columns, reading.data_format)
        return sum(
            _SMALL_FILE + 1 if source.name.startswith(HUB) else os.stat(source.name).st_size
            for source in sources
        )
    except (GraftError, OSError, ValueError):
        return 0


class _Work:
    """A data file that is read and encoded once, from its beginning."""

    def __init__(
        self,
        path: str,
        reading: Reading,
        tokenizer: Tokenizer,
        config: DataConfig,
        max_length: int,
        told: Listener,
    ) -> None:
        """Read until it is known whether the file is a large one."""
        self._path, self._reading = path, reading
        self._stream = RowStream(path, self._reading)
        self._name = str(Path(path))
        self._told = told
        self._lots = _lots(self._stream)
        self._first: list[_Lot] = []
        self.is_large = False
        rows = size = 0
        for lot in self._lots:
            self._first.append(lot)
            rows += len(lot.rows)
            size += lot.bytes
            self.is_large = rows > FEW_ROWS or size > FEW_BYTES
            if self.is_large:
                break
        self._total = round(_size(path, reading) / size * rows) if size else 0
        encoding = Encoding(max_length, config.eos, config.separator, config.stride)
        self._encoder = RowEncoder(self._stream.kind, tokenizer, encoding)

    def in_memory(self) -> EncodedData:
        """Return the examples of a small file."""
        rows = (row for lot in self._first for row in lot.rows)
        found = self._encoder.encode(rows, bad_rows(self._stream.skipped))
        for lot in self._first:
            self._complete(lot)
        return self.data(found)

    def data(self, examples: Sequence[Example]) -> EncodedData:
        """Return the examples of the file with what is known of its rows."""
        stream = self._stream
        found = _data(examples, self.noted())
        if stream.skipped is None:
            return found
        stream.skipped.check(found.row_count, str(stream.path))
        notes = (*found.notes, *stream.skipped.notes())
        return replace(found, notes=notes, skipped=stream.skipped)

    def noted(self) -> Mapping[str, Any]:
        """Return what is known of the rows, for `keep`."""
        return {
            "kind": self._stream.kind,
            "ignored_keys": self._stream.ignored_keys,
            "remarks": dict(self._encoder.remarks),
            "notes": self._stream.notes,
        }

    def noted_of(self, content: str) -> Mapping[str, Any]:
        """Return what `noted` does; raises GraftError when that content is there no more."""
        if content_key(self._path, self._reading) != content:
            raise GraftError(f"{self._path} was changed while it was read; begin again")
        return self.noted()

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the examples, in order; raises GraftError for the bad rows, all at once."""
        problems = bad_rows(self._stream.skipped)
        count = min(cores(), _MOST_PROCESSES)
        pool: Pool[_Lot] = Pool(self._answer, lambda lot: lot.request, _begin, count)
        done = 0
        try:
            with rendering():
                for lot, reply in pool.replies(self._all()):
                    if reply is None:
                        batch, wrong = self._encoded(lot.rows)
                    else:
                        batch, wrong, remarks = _unpacked(reply)
                        self._encoder.remarks.update(remarks)
                    for problem in wrong:
                        problems.add(problem)
                    if wrong:
                        self._complete(lot)
                    done += len(lot.rows)
                    self._told.progress("encoding", done, max(self._total, done + 1))
                    if not problems:
                        yield batch
        finally:
            pool.end()
            self._told.progress("encoding", 1, 1)
        problems.raise_all()

    def _complete(self, lot: _Lot) -> None:
        if self._stream.skipped is not None:
            self._stream.skipped.complete(lot.rows)

    def _all(self) -> Iterable[_Lot]:
        while self._first:
            yield self._first.pop(0)
        yield from self._lots

    def _encoded(self, rows: list[Row]) -> tuple[pa.RecordBatch, list[str]]:
        problems: list[str] = []
        return packed(self._encoder.examples(rows, problems.append), self._name), problems

    def _answer(self, request: bytes) -> bytes:
        """Encode a lot in a process of the pool."""
        rows = [Row(where, fields) for where, fields in json.loads(request)]
        self._encoder.remarks.clear()  # those of the lot before
        batch, problems = self._encoded(rows)
        head = json.dumps([problems, self._encoder.remarks])
        return head.encode() + b"\n" + bytes(batch.serialize())


def _data(examples: Sequence[Example], noted: Mapping[str, Any]) -> EncodedData:
    """Return examples with what was noted of their rows."""
    ignored = tuple(noted["ignored_keys"])
    return EncodedData(
        examples,
        noted["kind"],
        ignored,
        remarks=dict(noted["remarks"]),
        notes=tuple(noted["notes"]),
    )


def _unpacked(reply: bytes) -> tuple[pa.RecordBatch, list[str], dict[str, int]]:
    import pyarrow as pa

    from graft.data.storage.store import schema

    head, _, body = reply.partition(b"\n")
    problems, remarks = json.loads(head)
    return pa.ipc.read_record_batch(pa.py_buffer(body), schema()), problems, remarks


def _begin() -> None:
    """Be a process of the pool: one of several, each of which uses one core."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.set_threshold(50_000)  # a lot is many objects, and few of them garbage
    rendering_here()


def _lots(rows: Iterable[Row]) -> Iterator[_Lot]:
    """Yield rows in lots that are worth sending."""
    taken: list[Row] = []
    lines: list[bytes] = []
    size = 0
    for row in rows:
        line = _line(row)
        if line is None or len(line) > _LONGEST_SENT:
            if taken:
                yield _lot(taken, lines)
            yield _Lot([row], None, _LONGEST_SENT if line is None else len(line))
            taken, lines, size = [], [], 0
            continue
        taken.append(row)
        lines.append(line)
        size += len(line)
        if len(taken) == _LOT_ROWS or size > _LOT_BYTES:
            yield _lot(taken, lines)
            taken, lines, size = [], [], 0
    if taken:
        yield _lot(taken, lines)


def _lot(rows: list[Row], lines: list[bytes]) -> _Lot:
    request = b"[" + b",".join(lines) + b"]"
    return _Lot(rows, request, len(request))


def _line(row: Row) -> bytes | None:
    """Return a row as JSON; None for one that has none."""
    try:
        return json.dumps([row.where, row.fields], default=placeholder).encode()
    except (TypeError, ValueError, RecursionError):
        return None
