"""Parquet, read in a process of its own: 8 KB of pages may hold 4 GB of rows, or end a process."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Iterator
from typing import Any

from graft.apart import start_apart
from graft.data.sources.record import Record, without_nulls
from graft.data.sources.stream import Stream
from graft.errors import GraftError
from graft.files.bounds import VARIABLE, bound, raise_beyond

MEMORY = 2 * 2**30
"""Most memory to read a file with: pyarrow takes 0.3 GiB, and pages are read one by one."""
SECONDS = 30
"""Most processor time, and a second more for each MiB that the rows may have."""
_ODD = "\0"
"""The key of what stands for a value that JSON does not know; no field of a file is called so."""


def read_parquet(stream: Stream, keys: Collection[str] | None = None) -> Iterator[Record]:
    """Yield the rows; of those columns that are in `keys`, or of all, the others being None."""
    path, most = stream.path, stream.most_expanded
    seconds = bound(SECONDS) + (most >> 20)
    asked = None if keys is None else sorted(keys)
    with stream.plain_file() as file:
        process = start_apart(_tell, asked, seconds=seconds, memory=bound(MEMORY), stdin=file)
    assert process.stdout is not None
    try:
        others: dict[str, object] | None = None
        read = number = 0
        end: object = None
        while line := process.stdout.readline(stream.most_row + 1):
            read += len(line)
            if len(line) > stream.most_row:
                stream.refuse_long(number, "row")
            if read > most:
                raise_beyond(path, f"its rows have more than {most:,} bytes", f"{most:,}")
            if not line.endswith(b"\n"):  # cut off, as its writer was ended
                break
            found = json.loads(line, object_hook=_other)
            if isinstance(found, bool | dict):
                end = found
            elif others is None:
                others = dict.fromkeys(found)
            else:
                number += 1
                is_row = isinstance(found, list)
                yield Record(
                    f"{path}:row {number}",
                    others | _cleaned(found[0]) if is_row else None,
                    None if is_row else found,
                )
    finally:
        process.kill()
        process.stdout.close()
        process.wait()
    if isinstance(end, dict):
        words = " ".join(f"{kind}: {words}" for kind, words in end.items())
        raise GraftError(f"{path}: not a readable Parquet file: {words}")
    if end is not True:
        raise GraftError(
            f"{path}: not a readable Parquet file: reading it ended at row {number + 1}, or took "
            f"more than {seconds} s or {bound(MEMORY) >> 20} MiB; if it is whole, set {VARIABLE}=10"
        )


def _cleaned(row: dict[str, object]) -> dict[str, object]:
    """Return a row without what Arrow adds to structs, inside its columns."""
    return {key: without_nulls(value) for key, value in row.items()}


def _other(found: dict[str, object]) -> object:
    """Return an object, or what stands for a value that JSON does not know: of a type so named."""
    if list(found) == [_ODD]:
        return type(str(found[_ODD]), (), {})()
    return found


def _tell(keys: Collection[str] | None) -> None:
    """Write a line of JSON for each row of the file that is stdin.

    Before them the names of the columns that are not read; then a list with the row, or a text
    that says why it cannot be read; at last `true`, or what went wrong.
    """
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # which reserves no memory
    try:
        _tell_rows(keys)
        _write(True)
    # Whatever pyarrow may raise: this process is for nothing else.
    except Exception as error:
        _write({type(error).__name__: str(error)[:500]})
    sys.stdout.flush()


def _tell_rows(keys: Collection[str] | None) -> None:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(sys.stdin.buffer)
    names = file.schema_arrow.names
    if _ODD in file.schema_arrow.to_string(show_schema_metadata=False, show_field_metadata=False):
        raise ValueError("a column, or a field in it, has a zero byte in its name")
    # Without any of the keys a column is read all the same, for the number of rows.
    columns = names if keys is None else [name for name in names if name in keys] or names[:1]
    _write([name for name in names if name not in columns])
    for group in range(file.num_row_groups):
        facts = file.metadata.row_group(group)
        count = max(min(2**24 * facts.num_rows // max(facts.total_byte_size, 1), 1024), 1)
        for batch in file.iter_batches(count, [group], columns, use_threads=False):
            for row in _rows(batch):
                _write(row)


def _rows(batch: Any) -> Iterator[list[object] | str]:
    """Yield each row in a list, or why it is none."""
    try:
        for row in batch.to_pylist():
            yield [row]
    except (ValueError, TypeError, OverflowError) as error:
        if batch.num_rows == 1:
            yield f"not readable: {error}"
        else:
            for number in range(batch.num_rows):
                yield from _rows(batch.slice(number, 1))


def _write(value: object) -> None:
    line = json.dumps(value, ensure_ascii=False, default=lambda other: {_ODD: type(other).__name__})
    sys.stdout.buffer.write(line.encode("utf-8", "surrogatepass") + b"\n")
