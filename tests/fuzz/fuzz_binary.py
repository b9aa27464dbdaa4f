"""Mutations of safetensors, GGUF and pickled files that know their structure."""

from __future__ import annotations

import io
import json
import math
import pickletools
import struct
import zipfile
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from fuzz_json import VALUES, dump
from fuzz_mutation import BYTES, Expect, Mutation, choose

# safetensors --------------------------------------------------------------------------------------

_SIZES = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2},
    **{"I16": 2, "U16": 2, "U8": 1, "I8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1},
}
_NUMBERS = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
_ODD_NUMBERS = (math.nan, math.inf, -math.inf, 0.0, 65504.0, -1.0, 1e-7)


@dataclass
class Entry:
    """A tensor as its header says."""

    dtype: Any
    shape: Any
    data: bytes


def open_tensors(data: bytes) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return the tensors and the metadata of a sound file."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = header.pop("__metadata__", {})
    return {
        name: Entry(one["dtype"], one["shape"], body[slice(*one["data_offsets"])])
        for name, one in header.items()
    }, metadata


def tensor_file(tensors: dict[str, Entry], metadata: Any) -> bytes:
    """Return a file that is sound where the entries are."""
    header: dict[str, Any] = {"__metadata__": metadata}
    place = 0
    for name, one in tensors.items():
        header[name] = {"dtype": one.dtype, "shape": one.shape}
        header[name]["data_offsets"] = [place, place + len(one.data)]
        place += len(one.data)
    return _with_header(dump(header, None), b"".join(one.data for one in tensors.values()))


def _with_header(header: bytes, body: bytes) -> bytes:
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + body


def _entry(tensors: dict[str, Entry], rng: Random) -> str:
    return rng.choice(list(tensors))


_WITHOUT_EFFECT = {
    "g_idx",
    *("view_as_float", "unpack_view_dtype", "compute_dtype", "offload_meta", "optimize"),
    *("stores_quant_config", "channel_wise", "round_zero", "encoded_state_dict"),
}
"""What a layer may leave out: GPTQ's order of inputs, and how HQQ made it and where it kept it."""


def tensor_entry(data: bytes, rng: Random) -> Mutation:
    """Another shape, dtype, name or number of tensors, in a file that is sound itself."""
    tensors, metadata = open_tensors(data)
    name = _entry(tensors, rng)
    one, kind = tensors[name], rng.randrange(9)
    count = len(one.data) // _SIZES[one.dtype]
    if kind == 0:
        del tensors[name]
        unused = name.rpartition(".")[2] in _WITHOUT_EFFECT
        expect = Expect.SAME_IF_READ if unused else Expect.REFUSED
        return Mutation(tensor_file(tensors, metadata), f"without {name}", expect)
    if kind == 1:
        shapes = ([count], [1, count], [count, 1], one.shape[::-1], [*one.shape, 1], [1, 1, count])
        one.shape = rng.choice(shapes)
        what = f"{name} has shape {one.shape}"
    elif kind == 2:
        one.data = one.data[: _SIZES[one.dtype]]
        one.shape = rng.choice(([1], [], [1] * max(1, len(one.shape))))
        what = f"{name} has one element, shape {one.shape}"
    elif kind == 3:
        one.shape, one.data = [0, *one.shape[1:]], b""
        what = f"{name} is empty"
    elif kind == 4:
        alike = [dtype for dtype, size in _SIZES.items() if size == _SIZES[one.dtype]]
        one.dtype = rng.choice(alike)
        what = f"{name} is called {one.dtype}"
    elif kind == 5:
        one.dtype = rng.choice(list(_SIZES))
        one.data = (one.data * 8)[: count * _SIZES[one.dtype]]
        what = f"{name} is {one.dtype}"
    elif kind == 6:
        renamed = rng.choice(("", "x", name + ".", "\x1b[31m", "a" * 100_000, name.upper()))
        tensors[renamed] = tensors.pop(name)
        what = f"{name} is called {renamed[:20]!r}"
    elif kind == 7:
        other = _entry(tensors, rng)
        tensors[name], tensors[other] = tensors[other], tensors[name]
        what = f"{name} and {other} exchanged"
    else:
        extra = rng.choice((name + ".extra", "extra", "model.layers.9.self_attn.q_proj.weight"))
        tensors[extra] = Entry(one.dtype, one.shape, one.data)
        what = f"{extra} is there too"
    return Mutation(tensor_file(tensors, metadata), what)


def tensor_numbers(data: bytes, rng: Random) -> Mutation:
    """Odd numbers in the data of one tensor."""
    tensors, metadata = open_tensors(data)
    name = _entry(tensors, rng)
    one = tensors[name]
    if one.dtype in _NUMBERS:
        values = np.frombuffer(one.data, _NUMBERS[one.dtype]).copy()
        number = rng.choice(_ODD_NUMBERS)
        if values.size:
            values[slice(None) if rng.random() < 0.5 else rng.randrange(values.size)] = number
        one.data = values.tobytes()
        what = f"{name} holds {number}"
    else:
        byte = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80"))
        one.data = byte * len(one.data)
        what = f"{name} holds bytes {byte!r}"
    return Mutation(tensor_file(tensors, metadata), what)


def tensor_header(data: bytes, rng: Random) -> Mutation:
    """A header that lies."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = rng.choice([key for key in header if key != "__metadata__"])
    kind = rng.randrange(6)
    if kind == 0:
        claimed = rng.choice((0, 1, length - 1, length + 1, 10**8, 2**63, 2**64 - 1, len(data)))
        return Mutation(claimed.to_bytes(8, "little") + data[8:], f"header of {claimed} bytes")
    if kind == 1:
        start, end = header[name]["data_offsets"]
        offsets = ([0, 0], [end, start], [start, end + 8], [0, 2**62], [-1, end], [start, 10**30])
        header[name]["data_offsets"] = rng.choice(offsets)
        what = f"{name} lies at {header[name]['data_offsets']}"
    elif kind == 2:
        shapes = ([-1], [2**63], [2**32, 2**32], [10**30], "x", None, [[1]], [1.5], [0] * 10_000)
        header[name]["shape"] = rng.choice(shapes)
        what = f"{name} has shape {str(header[name]['shape'])[:30]}"
    elif kind == 3:
        field = rng.choice(("dtype", "shape", "data_offsets"))
        header[name][field] = rng.choice(VALUES)
        what = f"{field} of {name} = {str(header[name][field])[:30]!r}"
    elif kind == 4:
        del header[name][rng.choice(("dtype", "shape", "data_offsets"))]
        what = f"{name} lacks a field"
    else:
        header["__metadata__"] = rng.choice(VALUES)
        what = f"metadata = {str(header['__metadata__'])[:30]!r}"
    return Mutation(_with_header(dump(header, None), body), what)


def tensor_metadata(data: bytes, rng: Random) -> Mutation:
    tensors, metadata = open_tensors(data)
    metadata = metadata | {"fuzz": rng.choice(("", "text", "a" * 10_000))}
    return Mutation(tensor_file(tensors, metadata), "more metadata", Expect.SAME_IF_READ)


def tensor_order(data: bytes, rng: Random) -> Mutation:
    tensors, metadata = open_tensors(data)
    names = list(tensors)
    rng.shuffle(names)
    changed = tensor_file({name: tensors[name] for name in names}, metadata)
    return Mutation(changed, "tensors in another order", Expect.SAME_IF_READ)


SAFETENSORS = choose(
    [
        *((6, one) for one in (tensor_entry, tensor_header)),
        (4, tensor_numbers),
        *((1, one) for one in (tensor_metadata, tensor_order)),
        (3, BYTES),
    ]
)


# GGUF ---------------------------------------------------------------------------------------------

_GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_GGUF_STRING, _GGUF_ARRAY = 8, 9


def gguf_fields(data: bytes) -> list[tuple[str, int, int]]:
    """Return (what it says, place, bytes) of the numbers in the head of a sound GGUF file."""
    fields = [("magic", 0, 4), ("version", 4, 4), ("tensors", 8, 8), ("pairs", 16, 8)]
    tensors, pairs = struct.unpack_from("<QQ", data, 8)
    place = 24

    def number(what: str, size: int) -> int:
        nonlocal place
        fields.append((what, place, size))
        place += size
        return int.from_bytes(data[place - size : place], "little")

    def text(what: str) -> None:
        nonlocal place
        length = number(f"length of {what}", 8)
        fields.append((f"first bytes of {what}", place, min(length, 4)))
        place += length

    def value(kind: int, what: str) -> None:
        nonlocal place
        if kind == _GGUF_STRING:
            text(what)
        elif kind == _GGUF_ARRAY:
            inner, count = number(f"kind in {what}", 4), number(f"count of {what}", 8)
            for _ in range(count):
                if inner in _GGUF_SIZES:
                    place += _GGUF_SIZES[inner]
                else:
                    value(inner, what)
        else:
            number(what, _GGUF_SIZES[kind])

    for pair in range(pairs):
        text(f"key {pair}")
        value(number(f"kind {pair}", 4), f"value {pair}")
    for tensor in range(tensors):
        text(f"name {tensor}")
        for axis in range(number(f"axes {tensor}", 4)):
            number(f"size {tensor}.{axis}", 8)
        number(f"type {tensor}", 4)
        number(f"offset {tensor}", 8)
    return fields


def gguf_field(data: bytes, rng: Random) -> Mutation:
    changed, what = bytearray(data), []
    fields = [one for one in gguf_fields(data) if one[2]]
    most = [one for one in fields if not one[0].startswith(("length", "first"))]
    for _ in range(rng.choice((1, 1, 2))):
        name, place, size = rng.choice(most if rng.random() < 0.7 else fields)
        top = 2 ** (8 * size)
        number = rng.choice((0, 1, 2, 3, 7, 8, 12, 31, 1000, top // 2, top - 1, 10**9, 10**18))
        changed[place : place + size] = (number % top).to_bytes(size, "little")
        what.append(f"{name} = {number % top}")
    return Mutation(bytes(changed), "; ".join(what))


def gguf_array(data: bytes, rng: Random) -> Mutation:
    """Metadata of many elements, as a vocabulary is, or of arrays in arrays."""
    count, kind = 32 * rng.choice((100, 10**4, 10**6)) + 30, rng.choice((0, 1, _GGUF_ARRAY))
    # The pair has a multiple of 32 bytes, so that the tensors behind it stay in place.
    value, key = struct.pack("<IQ", kind, count) + bytes(count), b"fuzz.array"
    if kind == _GGUF_ARRAY:
        value = struct.pack("<IQ", _GGUF_ARRAY, 1) * (count // 12)
    pair = struct.pack("<Q", len(key)) + key + struct.pack("<I", _GGUF_ARRAY) + value
    (pairs,) = struct.unpack_from("<Q", data, 16)
    head = data[:16] + struct.pack("<Q", pairs + 1)
    return Mutation(head + pair + data[24:], f"array of {count} of kind {kind}")


GGUF = choose([(5, gguf_field), (1, gguf_array), (2, BYTES)])


# Pickles ------------------------------------------------------------------------------------------

_OPCODES = [one.code.encode("latin1") for one in pickletools.opcodes]
_PAYLOADS = (
    b"cos\nsystem\n(S'true'\ntR.",
    b"cbuiltins\neval\n(S'1+1'\ntR.",
    b"\x80\x02c__builtin__\nbytearray\nM\xff\xffM\xff\xff\x86R.",
    b"(lp0\n" + b"g0\n" * 1000 + b".",
    b"\x80\x04" + b"]" * 100_000 + b".",
    b"I1\n.",
    b"}.",
    b"N.",
    b"",
)


def _pickle(data: bytes, rng: Random) -> tuple[bytes, str]:
    if rng.random() < 0.15:
        payload = rng.choice(_PAYLOADS)
        return payload, f"payload {payload[:24]!r}"
    places = [(op.name, place) for op, _, place in pickletools.genops(data)]
    changed, what = bytearray(data), []
    for _ in range(rng.choice((1, 1, 3))):
        name, place = rng.choice(places)
        if rng.random() < 0.6:
            changed[place : place + 1] = rng.choice(_OPCODES)
            what.append(f"opcode {name} at {place}")
        else:
            spot = min(place + rng.randrange(1, 4), len(changed) - 1)
            changed[spot] = rng.choice((0, 1, 2, 0x7F, 0x80, 0xFF))
            what.append(f"argument of {name} at {place}")
    return bytes(changed), "; ".join(what)


def pickled(data: bytes, rng: Random) -> Mutation:
    """Another program in the pickle of a file of torch.save."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return BYTES(data, rng)
    written, what = io.BytesIO(), ""
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(written, "w") as new:
        for name in old.namelist():
            inside = old.read(name)
            if name.endswith("data.pkl"):
                inside, what = _pickle(inside, rng)
            elif rng.random() < 0.02:
                inside, what = inside[: len(inside) // 2], f"half of {name}"
            new.writestr(name, inside)
    return Mutation(written.getvalue(), what)


PICKLE = choose([(4, pickled), (1, BYTES)])
