"""Examples in a file of Arrow, mapped into memory: they are read when they are asked for.

Each example is a row: its token ids, the runs of those that are trained, where it stands in its
data file, and its `Facts`. Millions of examples take a few numbers each in memory, whatever their
lengths, and a file of them is opened without being read.
"""

from __future__ import annotations

import json
import mmap
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from graft.data.examples import Example
from graft.data.storage.facts import Facts, columns_of, joined
from graft.data.storage.keys import Keys

if TYPE_CHECKING:
    import pyarrow as pa

_GIVEN_BACK = 2**10
"""Examples after whose reading the memory is given back that was mapped for them."""

_BATCH_BYTES = 4 * 2**20
"""Bytes that a batch of the file has about."""
_HERE = "\0"
"""Stands for the name of the data file, which may be called otherwise another time."""


class Examples(Sequence[Example]):
    """Examples that are read when they are asked for; equal to any sequence of the same ones."""

    @property
    @abstractmethod
    def facts(self) -> Facts:
        """What is asked of all of them at once."""

    @abstractmethod
    def at(self, number: int) -> Example:
        """Return one of them; `number` is neither negative nor too large."""

    @abstractmethod
    def place(self, number: int) -> str:
        """Return where the row of one of them stands, without reading its tokens."""

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        numbers = range(len(self))[index]
        if isinstance(numbers, range):
            return Chosen([self], np.arange(numbers.start, numbers.stop, numbers.step))
        return self.at(numbers)

    def __iter__(self) -> Iterator[Example]:
        return map(self.at, range(len(self)))

    def __add__(self, others: Sequence[Example]) -> Examples:
        return Chosen([self, others], np.arange(len(self) + len(others)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(map(_equal, self, other))

    __hash__ = None  # type: ignore[assignment]


def _equal(one: object, other: object) -> bool:
    return one == other


def facts_of(examples: Sequence[Example]) -> Facts:
    """Return what is asked of all examples at once, without reading those that are stored."""
    return examples.facts if isinstance(examples, Examples) else columns_of(examples).facts


def places_of(examples: Sequence[Example]) -> Iterator[str]:
    """Yield where each example's row stands, without reading tokens that are stored."""
    return (_place(examples, number) for number in range(len(examples)))


def _place(examples: Sequence[Example], number: int) -> str:
    if isinstance(examples, Examples):
        return examples.place(number)
    return examples[number].where


class Chosen(Examples):
    """Examples of several sequences, by their numbers as if these stood one after the other.

    A number may be there twice. Those of a split, a slice or a mixture are such numbers.
    """

    def __init__(self, parts: Sequence[Sequence[Example]], numbers: NDArray[np.int64]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def at(self, number: int) -> Example:
        part, index = self._found(number)
        return part[index]

    def place(self, number: int) -> str:
        part, index = self._found(number)
        return _place(part, index)

    def _found(self, number: int) -> tuple[Sequence[Example], int]:
        """Return the sequence that one of them is in, and its number there."""
        index = int(self._numbers[number])
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part], index - int(self._ends[part]) + len(self._parts[part])

    @cached_property
    def facts(self) -> Facts:
        return joined([facts_of(part) for part in self._parts]).of(self._numbers)


class Stored(Examples):
    """The examples of a file that a `Writer` wrote; `path` is the data file that they are of."""

    def __init__(self, file: IO[bytes], path: str) -> None:
        """Map a file, which may be closed and removed then.

        Raises what pyarrow raises for a file that is none of these.
        """
        import pyarrow as pa

        self._path = path
        self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        reader = pa.ipc.open_file(pa.py_buffer(self._map))
        self._batches: list[_Batch] = []
        facts = [columns_of([]).facts]
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            self._batches.append(_Batch(batch))
            facts.append(_facts(batch))
            self._give_back()
        self._facts = joined(facts)
        self._ends = np.cumsum([len(batch.where) for batch in self._batches])
        self._asked = 0

    def __len__(self) -> int:
        return len(self._facts.lengths)

    @property
    def facts(self) -> Facts:
        return self._facts

    def at(self, number: int) -> Example:
        batch, row = self._found(number)
        facts = self._facts
        targets = [False] * int(facts.lengths[number])
        edges = batch.runs[batch.run_ends[row] : batch.run_ends[row + 1]].tolist()
        for begin, end in zip(edges[::2], edges[1::2], strict=True):
            targets[begin:end] = [True] * (end - begin)
        values = batch.values[row].as_py()
        return Example(
            batch.ids[batch.ends[row] : batch.ends[row + 1]].tolist(),
            targets,
            self._where(batch, row),
            bool(facts.cut[number]),
            bool(facts.trains_eos[number]),
            json.loads(values) if values else {},
            int(facts.lost[number]),
            int(facts.windows[number]),
            Keys(int(facts.row_keys[number]), int(facts.prompt_keys[number])),
        )

    def place(self, number: int) -> str:
        return self._where(*self._found(number))

    def _where(self, batch: _Batch, row: int) -> str:
        where: str = batch.where[row].as_py()
        return where.replace(_HERE, self._path, 1)

    def _found(self, number: int) -> tuple[_Batch, int]:
        """Return the batch that one of them is in, and its row there."""
        self._asked += 1
        if self._asked % _GIVEN_BACK == 0:
            self._give_back()
        index = int(np.searchsorted(self._ends, number, side="right"))
        batch = self._batches[index]
        return batch, number - int(self._ends[index]) + len(batch.where)

    def _give_back(self) -> None:
        """Leave what was read to the system's cache of the file, which is no memory of ours."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


class _Batch:
    """A record batch as arrays that lie in the mapped file."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.ids, self.ends = _list(batch.column("ids"))
        self.runs, self.run_ends = _list(batch.column("runs"))
        self.where, self.values = batch.column("where"), batch.column("values")


def _facts(batch: pa.RecordBatch) -> Facts:
    """Return the facts of a record batch, in memory: they are asked for again and again."""
    _, ends = _list(batch.column("ids"))
    flags = np.array(batch.column("flags"))
    return Facts(
        lengths=np.diff(ends),
        cut=(flags & 1).astype(np.bool_),
        trains_eos=(flags & 2).astype(np.bool_),
        **{name: np.array(batch.column(name)) for name in (*_NUMBERS, *_KEYS)},
    )


_NUMBERS = ("targets", "prompts", "largest", "lost", "windows")
_KEYS = ("row_keys", "prompt_keys")


def _list(column: Any) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the values of a column of lists, and where each list begins and the last one ends."""
    return np.asarray(column.values), np.asarray(column.offsets)


def schema() -> pa.Schema:
    """Return what a file of examples holds."""
    import pyarrow as pa

    numbers = pa.int32()
    fields = [("ids", pa.list_(numbers)), ("runs", pa.list_(numbers)), ("where", pa.string())]
    fields += [(name, numbers) for name in _NUMBERS]
    fields += [(name, pa.uint64()) for name in _KEYS]
    return pa.schema([*fields, ("flags", pa.uint8()), ("values", pa.string())])


def packed(examples: Sequence[Example], path: str) -> pa.RecordBatch:
    """Return examples as a record batch of a file; `path` is the data file that they are of."""
    import pyarrow as pa

    columns = columns_of(examples)
    facts = columns.facts
    numbers = facts.columns()
    flags = facts.cut.astype(np.uint8) + 2 * facts.trains_eos.astype(np.uint8)
    where = [
        _HERE + one.where.removeprefix(path) if one.where.startswith(path) else one.where
        for one in examples
    ]
    values = [json.dumps(dict(one.values)) if one.values else "" for one in examples]
    return pa.record_batch(
        [
            pa.ListArray.from_arrays(columns.ends, columns.ids),
            pa.ListArray.from_arrays(columns.run_ends, columns.runs),
            pa.array(where, pa.string()),
            *(pa.array(numbers[name]) for name in (*_NUMBERS, *_KEYS)),
            pa.array(flags),
            pa.array(values, pa.string()),
        ],
        schema=schema(),
    )


def write_batches(target: Path | IO[bytes], batches: Iterable[pa.RecordBatch]) -> None:
    """Write record batches to a file, one after the other; raises OSError when that fails."""
    import pyarrow as pa

    sink = pa.OSFile(str(target), "wb") if isinstance(target, Path) else pa.PythonFile(target, "w")
    with pa.ipc.new_file(sink, schema()) as writer:
        for batch in _gathered(batches):
            writer.write_batch(batch)
    sink.close() if isinstance(target, Path) else target.flush()


def _gathered(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield fewer and larger batches: each takes a page and some time when the file is opened."""
    import pyarrow as pa

    group: list[pa.RecordBatch] = []
    size = 0
    for batch in batches:
        group.append(batch)
        size += batch.nbytes
        if size > _BATCH_BYTES:
            yield from pa.Table.from_batches(group).combine_chunks().to_batches()
            group, size = [], 0
    if group:
        yield from pa.Table.from_batches(group).combine_chunks().to_batches()
