"""What a mutation is, and mutations of plain bytes, text and whole files."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from random import Random


class Expect(Enum):
    """What must come of a mutated file."""

    ANY = "a GraftError or an answer"
    SAME = "the answer of the file as it was"
    SAME_IF_READ = "the answer of the file as it was, or a GraftError"
    REFUSED = "a GraftError"


@dataclass(frozen=True)
class Mutation:
    """A file's new content, or what stands in its place."""

    data: bytes | None
    """None: `instead` takes its place."""
    what: str
    """What was done, in a few words."""
    expect: Expect = Expect.ANY
    instead: str = ""
    """missing, folder, fifo, zero (a link to /dev/zero), or the name of a file in the corpus."""


Mutator = Callable[[bytes, Random], Mutation]


def choose(mutators: Sequence[tuple[int, Mutator]]) -> Mutator:
    """Return a mutator that draws one of several by their weights."""

    def mutate(data: bytes, rng: Random) -> Mutation:
        (one,) = rng.choices([each for _, each in mutators], [weight for weight, _ in mutators])
        return one(data, rng)

    return mutate


# Bytes --------------------------------------------------------------------------------------------


def flip(data: bytes, rng: Random) -> Mutation:
    changed = bytearray(data)
    count = rng.choice((1, 1, 4, 32))
    for _ in range(count if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return Mutation(bytes(changed), f"{count} bits flipped")


def truncate(data: bytes, rng: Random) -> Mutation:
    end = rng.choice((0, 1, len(data) // 2, max(len(data) - 1, 0), rng.randrange(len(data) + 1)))
    return Mutation(data[:end], f"cut after {end} of {len(data)} bytes")


def _piece(data: bytes, rng: Random) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 8, 64, 1024, len(data))))


def zero(data: bytes, rng: Random) -> Mutation:
    start, end = _piece(data, rng)
    byte = rng.choice((b"\0", b"\xff"))
    return Mutation(data[:start] + byte * (end - start) + data[end:], f"{byte!r} {start}:{end}")


def duplicate(data: bytes, rng: Random) -> Mutation:
    start, end = _piece(data, rng)
    return Mutation(data[:end] + data[start:end] + data[end:], f"{start}:{end} twice")


def insert(data: bytes, rng: Random) -> Mutation:
    place = rng.randrange(len(data) + 1)
    size = rng.choice((1, 7, 300))
    return Mutation(data[:place] + rng.randbytes(size) + data[place:], f"{size} bytes at {place}")


def remove(data: bytes, rng: Random) -> Mutation:
    start, end = _piece(data, rng)
    return Mutation(data[:start] + data[end:], f"without {start}:{end}")


def noise(data: bytes, rng: Random) -> Mutation:
    return Mutation(rng.randbytes(rng.choice((1, 100, 5000))), "random bytes")


def in_place_of_file(data: bytes, rng: Random) -> Mutation:
    instead = rng.choice(("missing", "folder", "fifo", "zero"))
    return Mutation(None, instead, instead=instead)


BYTES = choose(
    [
        *((2, one) for one in (flip, zero, duplicate, insert, remove)),
        *((1, one) for one in (truncate, noise)),
        (1, in_place_of_file),
    ]
)


# Text ---------------------------------------------------------------------------------------------

ODD = (
    b"\xff\xfe",
    b"\xc3\x28",
    b"\xed\xa0\x80",
    b"\0",
    b"\x1b[31mred\x1b]0;title\x07",
    b"\x1b]52;c;aGk=\x07",
    b"\x7f\x08\x0b\x0c\x1c\x85",
    "\u202e\u2028\u0085\ufeff".encode(),
    b"\\ud800",
    b"\\u0000",
    b"\r",
    b"\t",
    b'"',
    b"\\",
    b"{",
    b"]",
    b"\xf4\x8f\xbf\xbf",
    "\U0001f469\u200d\U0001f52c".encode() * 50,
)


def odd_text(data: bytes, rng: Random) -> Mutation:
    piece = rng.choice(ODD)
    place = rng.randrange(len(data) + 1)
    return Mutation(data[:place] + piece + data[place:], f"{piece[:20]!r} at {place}")


def long_line(data: bytes, rng: Random) -> Mutation:
    place = rng.randrange(len(data) + 1)
    size = rng.choice((10_000, 300_000, 3_000_000))
    piece = rng.choice((b"a", b"long ", b"\xe2\x82\xac"))
    return Mutation(data[:place] + piece * (size // len(piece)) + data[place:], f"{size} bytes")


def byte_order_mark(data: bytes, rng: Random) -> Mutation:
    return Mutation(b"\xef\xbb\xbf" + data, "byte order mark", Expect.SAME_IF_READ)


def other_encoding(data: bytes, rng: Random) -> Mutation:
    encoding = rng.choice(("utf-16", "utf-32", "utf-16-be"))
    return Mutation(data.decode(errors="replace").encode(encoding, "replace"), encoding)


def windows_lines(data: bytes, rng: Random) -> Mutation:
    return Mutation(data.replace(b"\n", b"\r\n"), "CRLF", Expect.SAME_IF_READ)


TEXT = choose([(4, odd_text), (1, long_line), (1, byte_order_mark), (1, other_encoding)])


def zipped(inside: Mutator) -> Mutator:
    """Return a mutator of .gz files: of what is inside, of the bytes, and bombs."""

    def mutate(data: bytes, rng: Random) -> Mutation:
        kind = rng.randrange(8)
        if kind == 0:
            level = rng.randrange(10)
            plain = gzip.compress(gzip.decompress(data), level, mtime=0)
            return Mutation(plain, f"compressed with level {level}", Expect.SAME)
        if kind == 1:
            member = gzip.compress(bytes(2**24), mtime=0)
            return Mutation(member * rng.choice((16, 200)), "bomb of zeros")
        if kind == 2:
            # The shorter one is a sound file of many rows.
            member = gzip.compress(b'{"text": "a"}\n' * 2**15, mtime=0)
            return Mutation(member * rng.choice((1, 6400)), "bomb of rows")
        if kind < 5:
            return BYTES(data, rng)
        mutation = inside(gzip.decompress(data), rng)
        if mutation.data is None:
            return mutation
        changed = gzip.compress(mutation.data, mtime=0)
        return Mutation(changed, f"gz of: {mutation.what}", mutation.expect)

    return mutate
