"""The head of a GGUF file: metadata and where the tensors lie, each number checked by the file.

gguf's own reader makes an object of every element of every array, 18 µs each: a vocabulary takes it
seconds, and an array that is long for no reason minutes. Arrays are passed over here and read when
they are asked for, so that the work is bounded by the number of values.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from graft.files.bounds import bound, raise_beyond

Bytes = npt.NDArray[np.uint8]

VALUES = 5_000_000
"""Metadata, their strings, and tensors of a file; a vocabulary of 256,000 with its merges has a
million."""

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_AXES = 4
_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}
_GONE = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}
"""Types that llama.cpp has taken back, by the number that a file has for them."""


@dataclass(frozen=True, eq=False)
class Array:
    """An array among the metadata; its elements are read when they are asked for."""

    kind: GGUFValueType
    count: int
    data: Bytes
    """All elements as they lie in the file; each string behind its length."""

    def numbers(self) -> list[Any]:
        """Return the elements of an array of numbers; raises ValueError for one of strings."""
        if self.kind is GGUFValueType.STRING:
            raise ValueError("strings stand where numbers are expected")
        return list(np.frombuffer(self.data.tobytes(), np.dtype(_SCALARS[self.kind])).tolist())

    def texts(self) -> list[str]:
        """Return the elements of an array of strings; raises ValueError for one of numbers.

        Bytes that are no UTF-8 become lone surrogates.
        """
        if self.kind is not GGUFValueType.STRING:
            raise ValueError("numbers stand where strings are expected")
        found, data, at = [], self.data.tobytes(), 0
        for _ in range(self.count):
            (length,) = struct.unpack_from("<Q", data, at)
            at += 8 + length
            found.append(data[at - length : at].decode(errors="surrogateescape"))
        return found

    def same(self, other: object) -> bool:
        """Return whether another value is an array of the same elements."""
        return (
            isinstance(other, Array)
            and (self.kind, self.count) == (other.kind, other.count)
            and np.array_equal(self.data, other.data)
        )


@dataclass(frozen=True)
class Place:
    """Where a tensor lies, and what it is."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    """As PyTorch counts: rows first."""
    begin: int
    bytes: int


class Header:
    """What a file's head says; raises ValueError where it is malformed or ends too early."""

    def __init__(self, path: Path, data: Bytes) -> None:
        self._path, self._data, self._at, self._values = path, data, 0, 0
        if bytes(self._take(len(_MAGIC))) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        if (version := self._number("<I")) not in _VERSIONS:
            _raise_version(version)
        tensors, pairs = self._number("<Q"), self._number("<Q")
        self.metadata = self._named(pairs, self._value)
        found = self._named(tensors, self._tensor)
        alignment = self.metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError("general.alignment is no power of two")
        begin = -(-self._at // alignment) * alignment
        self.tensors = {name: self._placed(name, begin, *one) for name, one in found.items()}

    def _take(self, count: int) -> Bytes:
        self._count()
        if count > len(self._data) - self._at:
            raise ValueError(f"it ends before byte {self._at + count:,}")
        self._at += count
        return self._data[self._at - count : self._at]

    def _count(self) -> None:
        self._values += 1
        if self._values > bound(VALUES):
            raise_beyond(self._path, f"more than {bound(VALUES):,} values", f"{bound(VALUES):,}")

    def _number(self, form: str) -> Any:
        return struct.unpack(form, bytes(self._take(struct.calcsize(form))))[0]

    def _text(self) -> str:
        return bytes(self._take(self._number("<Q"))).decode()

    def _named(self, count: int, read: Callable[[], Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):  # each takes bytes, so it ends with the file
            name = self._text()
            if name in found:
                raise ValueError(f"the name {name[:80]!r} stands there twice")
            found[name] = read()
        return found

    def _value(self) -> Any:
        """Return a string, a number or an Array."""
        kind = GGUFValueType(self._number("<I"))
        if kind is GGUFValueType.ARRAY:
            return self._array()
        return self._text() if kind is GGUFValueType.STRING else self._number(_SCALARS[kind])

    def _array(self) -> Array:
        kind, count = GGUFValueType(self._number("<I")), self._number("<Q")
        begin = self._at
        if kind is GGUFValueType.STRING:
            for _ in range(count):
                self._take(self._number("<Q"))
        elif kind is GGUFValueType.ARRAY:
            raise ValueError("an array holds arrays")
        else:
            self._take(count * struct.calcsize(_SCALARS[kind]))
        return Array(kind, count, self._data[begin : self._at])

    def _tensor(self) -> tuple[tuple[int, ...], int, int]:
        axes = self._number("<I")
        if axes > _AXES:
            raise ValueError(f"a tensor has {axes} axes; expected at most {_AXES}")
        sizes = [self._number("<Q") for _ in range(axes)]
        return tuple(reversed(sizes)), self._number("<I"), self._number("<Q")

    def _placed(
        self, name: str, begin: int, shape: tuple[int, ...], number: int, offset: int
    ) -> Place:
        kind = _type(name, number)
        weights, size = GGML_QUANT_SIZES[kind]
        columns = shape[-1] if shape else 1
        if columns % weights:
            raise ValueError(f"a row of {columns} is no whole number of {kind.name} blocks")
        length = math.prod(shape) // weights * size
        if begin + offset + length > len(self._data):
            raise ValueError(f"it ends before the tensor {name[:80]!r} does")
        return Place(kind, shape, begin + offset, length)


def _raise_version(version: int) -> None:
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if swapped in _VERSIONS:
        raise ValueError("it is big-endian; expected little-endian")
    raise ValueError(f"it has version {version}; expected 2 or 3")


def _type(name: str, number: int) -> GGMLQuantizationType:
    try:
        return GGMLQuantizationType(number)
    except ValueError as error:
        known = f"{_GONE[number]}, which llama.cpp reads no more" if number in _GONE else "unknown"
        raise ValueError(f"the tensor {name[:80]!r} has type {number}: {known}") from error
