"""Parquet and Arrow, read apart: 8 KB of pages may hold 4 GB of rows, or end a process."""

from __future__ import annotations

import datetime
import decimal
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from graft.apart import start_apart
from graft.data.sources.record import Layout, Record, chosen_columns, without_nulls
from graft.data.sources.stream import Stream
from graft.errors import GraftError
from graft.files.bounds import VARIABLE, bound, raise_beyond

MEMORY = 2 * 2**30
"""Most memory to read a file with: pyarrow takes 0.3 GiB, and pages are read one by one."""
SECONDS = 30
"""Most processor time, and a second more for each MiB that the rows may have."""
_ODD = "\0"
"""The key of what stands for a value that JSON does not know; no field of a file is called so."""
_SHORTEST = 9
"""Bytes that any row has as a line."""
_TIMES = (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal)
"""What is no JSON, and inside a list or an object is read as text."""


def read_parquet(stream: Stream, layouts: Sequence[Layout] | None = None) -> Iterator[Record]:
    """Yield the rows of a Parquet file; see `read_columns`."""
    return _read_columns(stream, layouts, "Parquet")


def read_arrow(stream: Stream, layouts: Sequence[Layout] | None = None) -> Iterator[Record]:
    """Yield the rows of an Arrow file, as a stream or not, which Feather files are, too."""
    return _read_columns(stream, layouts, "Arrow")


def _read_columns(stream: Stream, layouts: Sequence[Layout] | None, kind: str) -> Iterator[Record]:
    """Yield the rows; of those columns that the layouts name, or of all, the others being None.

    A value that Python does not hold spoils its column in its row.
    """
    path, most = stream.path, stream.most_expanded
    seconds = bound(SECONDS) + (most >> 20)
    with stream.plain_file() as file:
        process = start_apart(
            _tell, layouts, kind, seconds=seconds, memory=bound(MEMORY), stdin=file
        )
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
                _refuse_large(stream)
            if not line.endswith(b"\n"):  # cut off, as its writer was ended
                break
            found = json.loads(line, object_hook=_other)
            if isinstance(found, bool | dict):
                end = found
            elif isinstance(
                found, int
            ):  # rows: that there are too many is known before any is read
                if found * _SHORTEST > most:
                    _refuse_large(stream)
            elif others is None:
                others = dict.fromkeys(found)
            else:
                number += 1
                row, spoiled = found
                yield Record(f"{path}:row {number}", others | _cleaned(row), None, spoiled or None)
    finally:
        process.kill()
        process.stdout.close()
        process.wait()
    if isinstance(end, dict):
        words = " ".join(f"{name}: {words}" for name, words in end.items())
        raise GraftError(f"{path}: not a readable {kind} file: {words}")
    if end is not True:
        raise GraftError(
            f"{path}: not a readable {kind} file: reading it ended at row {number + 1}, or took "
            f"more than {seconds} s or {bound(MEMORY) >> 20} MiB; if it is whole, set {VARIABLE}=10"
        )


def _refuse_large(stream: Stream) -> NoReturn:
    most = f"{stream.most_expanded:,}"
    raise_beyond(stream.path, f"its rows have more than {most} bytes", most)


def _cleaned(row: dict[str, object]) -> dict[str, object]:
    """Return a row without what Arrow adds to structs, inside its columns."""
    return {key: without_nulls(value) for key, value in row.items()}


def _other(found: dict[str, object]) -> object:
    """Return an object, or what stands for a value that JSON does not know: of a type so named."""
    if list(found) == [_ODD]:
        return type(str(found[_ODD]), (), {})()
    return found


def _tell(layouts: Sequence[Sequence[Any]] | None, kind: str) -> None:
    """Write a line of JSON for each row of the file that is stdin.

    Before them how many there are (of Parquet), and the names of the columns that are not read;
    then a list of the row and why columns of it are spoiled; at last `true`, or what went wrong.
    """
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # which reserves no memory
    try:
        for batch in _parquet(layouts) if kind == "Parquet" else _arrow(layouts):
            for row in _rows(batch):
                _write(row)
        _write(True)
    # Whatever pyarrow may raise: this process is for nothing else.
    except Exception as error:
        _write({type(error).__name__: str(error)[:500]})
    sys.stdout.flush()


def _parquet(layouts: Sequence[Sequence[Any]] | None) -> Iterator[Any]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(sys.stdin.buffer)
    _write(file.metadata.num_rows)
    columns = _choose(file.schema_arrow, layouts)
    for group in range(file.num_row_groups):
        facts = file.metadata.row_group(group)
        count = max(min(2**24 * facts.num_rows // max(facts.total_byte_size, 1), 1024), 1)
        yield from file.iter_batches(count, [group], columns, use_threads=False)


def _arrow(layouts: Sequence[Sequence[Any]] | None) -> Iterator[Any]:
    from pyarrow import ipc

    file = sys.stdin.buffer
    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    opened = ipc.open_file if is_file else ipc.open_stream
    schema = opened(file).schema
    columns = set(_choose(schema, layouts))
    places = [place for place, name in enumerate(schema.names) if name in columns]
    options = ipc.IpcReadOptions(included_fields=places, use_threads=False)
    file.seek(0)
    reader = opened(file, options=options)
    batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
    for batch in batches:
        count = max(min(2**24 * batch.num_rows // max(batch.nbytes, 1), 1024), 1)
        for begin in range(0, batch.num_rows, count):
            yield batch.slice(begin, count)


def _choose(schema: Any, layouts: Sequence[Sequence[Any]] | None) -> list[str]:
    """Return the columns to read, and tell the others."""
    import pyarrow as pa

    chosen = chosen_columns(schema.names, layouts)
    read = pa.schema([field for field in schema if field.name in chosen])
    if _ODD in read.to_string(show_schema_metadata=False, show_field_metadata=False):
        raise ValueError("a column, or a field in it, has a zero byte in its name")
    _write([name for name in dict.fromkeys(schema.names) if name not in chosen])
    return chosen


def _rows(batch: Any) -> Iterator[tuple[dict[str, object], dict[str, str]]]:
    """Yield each row, and why columns of it are spoiled."""
    names = batch.schema.names
    spoiled: list[dict[str, str]] = [{} for _ in range(batch.num_rows)]
    columns = []
    for name, column in zip(names, batch.columns, strict=True):
        try:
            columns.append(column.to_pylist())
        except (ValueError, TypeError, OverflowError):
            columns.append(_one_by_one(name, column, spoiled))
    for name, count in Counter(names).items():
        if count > 1:
            for row in spoiled:
                row[name] = "the file has two columns of this name"
    for row, values in zip(spoiled, zip(*columns, strict=True), strict=True):
        yield {name: _named(value) for name, value in zip(names, values, strict=True)}, row


def _one_by_one(name: str, column: Any, spoiled: list[dict[str, str]]) -> list[object]:
    """Return a column's values, and tell which of them Python does not hold."""
    values: list[object] = []
    for row in range(len(column)):
        value = column.slice(row, 1)
        try:
            try:
                values += value.to_pylist()
            except (ValueError, TypeError, OverflowError):
                # In a list or a struct a time that no clock shows is read as its number.
                plain = _without_times(value.type)
                if plain == value.type or value.type.num_fields == 0:
                    raise
                values += value.cast(plain).to_pylist()
        except (ValueError, TypeError, OverflowError, NotImplementedError) as error:
            spoiled[row][name] = f"not readable: {str(error)[:200]}"
            values.append(None)
    return values


def _without_times(kind: Any) -> Any:
    """Return an Arrow type with a number in the place of every time in it."""
    import pyarrow as pa

    if pa.types.is_temporal(kind):
        return pa.int64() if kind.bit_width == 64 else pa.int32()
    if pa.types.is_struct(kind):
        return pa.struct([one.with_type(_without_times(one.type)) for one in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_without_times(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_without_times(kind.value_type)))
    return kind


def _named(value: object) -> object:
    """Return a column's value; of a time or a decimal number the kind, as it is no text."""
    return {_ODD: type(value).__name__} if isinstance(value, _TIMES) else value


def _inside(value: object) -> object:
    """Return what stands for a value that JSON does not know."""
    return str(value) if isinstance(value, _TIMES) else {_ODD: type(value).__name__}


def _write(value: object) -> None:
    line = json.dumps(value, ensure_ascii=False, default=_inside)
    sys.stdout.buffer.write(line.encode("utf-8", "surrogatepass") + b"\n")
