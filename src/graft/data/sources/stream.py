"""A data file as a stream of lines, decompressed within bounds."""

from __future__ import annotations

import gzip
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NoReturn, cast

from graft.data.sources.encoding import Recoded, encoding_of
from graft.errors import GraftError
from graft.files.bounds import bound, raise_beyond
from graft.files.read import open_regular

LINE_BYTES = 32 * 2**20
"""Most bytes of a line, a CSV row or a .txt document; parsed, they may take 25 times as many."""
EXPANSION = 100
"""Bytes that a byte of a compressed file may become: text compresses to a fourth, rows from a
template to a fiftieth, and a bomb to a thousandth."""
EXPANDED_BYTES = 16 * 2**20
"""What any compressed file may become, however small it is."""
WHOLE_BYTES = 2 * 2**30
"""Most bytes of a file that is not read line by line."""

_PIECE = 2**20
_POINTER = b"version https://git-lfs.github.com/"


class Stream:
    """A regular file, .gz or not, that is read once; everything raises GraftError with its name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_regular(path)
        if os.pread(self._file.fileno(), len(_POINTER), 0) == _POINTER:
            self._file.close()
            raise GraftError(
                f"{path}: a pointer of Git LFS, and not the file itself; fetch that with: "
                "git lfs pull"
            )
        size = os.fstat(self._file.fileno()).st_size
        self.most_expanded = max(bound(EXPANDED_BYTES), bound(EXPANSION) * size)
        """Most bytes that the compressed file may become."""
        self.most_row = bound(LINE_BYTES)
        """Most bytes of a line, or of a row of several."""
        self._compressed = path.suffix.lower() == ".gz"
        self._stream: IO[bytes] = self._file
        self._read = 0
        self.blank = True
        """Whether nothing but white space has been read."""
        if self._compressed:
            # All of it once beforehand: that a bomb is one is known before its rows are parsed,
            # which takes twenty times as long.
            try:
                with self._decompressing() as self._stream:
                    while self._next(_PIECE):
                        pass
            except BaseException:
                self._file.close()
                raise
            self._file.seek(0)
            self._read, self.blank = 0, True
            self._stream = self._decompressing()

    def _decompressing(self) -> IO[bytes]:
        return cast(IO[bytes], gzip.GzipFile(fileobj=self._file))

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._file.close()

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield every line with its number, without the newline that alone ends it.

        An old Mac's lines end in a carriage return, and no newline is in its files.
        """
        number = 1
        rest = end = b""
        for piece in self._text():
            end = end or (b"\r" if b"\r" in piece[:-1] and b"\n" not in piece else b"\n")
            first, *others = piece.split(end)
            rest += first
            if len(rest) > self.most_row:
                self.refuse_long(number, "line")
            for line in others:
                yield number, rest
                number += 1
                rest = line
        if rest:
            yield number, rest

    def refuse_long(self, number: int, what: str) -> NoReturn:
        """Raise GraftError for a part of the file, which begins in a line, that is too long."""
        most = f"{self.most_row:,}"
        raise_beyond(f"{self.path}:{number}", f"a {what} of more than {most} bytes", most)

    def whole(self) -> bytes:
        """Return all that is in the file."""
        pieces = []
        for piece in self._text():
            pieces.append(piece)
            if self._read > bound(WHOLE_BYTES):
                most = f"{bound(WHOLE_BYTES):,} bytes"
                raise_beyond(self.path, f"more than {most}", f"{most} of a file that is one value")
        return b"".join(pieces)

    @contextmanager
    def plain_file(self) -> Iterator[IO[bytes]]:
        """Yield a file on the disk that is this one, or holds what is in it, decompressed."""
        self.blank = False
        if not self._compressed:
            yield self._file
            return
        try:
            with tempfile.TemporaryFile() as copy:
                while piece := self._next(_PIECE):
                    copy.write(piece)
                copy.seek(0)
                yield copy
        except OSError as error:
            raise GraftError(f"{self.path} cannot be decompressed: {error.strerror}") from error

    def _text(self) -> Iterator[bytes]:
        """Yield the file in pieces, as UTF-8 where it is UTF-16."""
        recoded: Recoded | None = None
        first = True
        while piece := self._next(_PIECE):
            if first and (encoding := encoding_of(piece)) is not None:
                recoded = Recoded(encoding, self.path)
            first = False
            yield piece if recoded is None else recoded.utf8(piece, False)
        if recoded is not None:
            yield recoded.utf8(b"", True)

    def _next(self, most: int) -> bytes:
        try:
            found = self._stream.read(most)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise GraftError(
                f"{self.path}: not a complete gzip file ({error}); download or compress it again"
            ) from error
        except OSError as error:
            raise GraftError(f"{self.path} cannot be read: {error.strerror}") from error
        self._read += len(found)
        self.blank = self.blank and not found.strip()
        if self._compressed and self._read > self.most_expanded:
            most_expanded = f"{self.most_expanded:,} bytes"
            raise_beyond(
                self.path,
                f"becomes more than {most_expanded} when it is decompressed",
                f"{EXPANSION} times its size, or {EXPANDED_BYTES >> 20} MiB,",
            )
        return found


def decode(content: bytes, path: Path, number: int = 1) -> str:
    """Return what begins in a line of a file as text; raises GraftError with the line."""
    try:
        # utf-8-sig: spreadsheets write a byte order mark, which must not enter the first key.
        return content.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        # Behind a byte order mark places are counted without it.
        content = error.object
        line = number + content.count(b"\n", 0, error.start)
        place = error.start - content.rfind(b"\n", 0, error.start)
        raise GraftError(
            f"{path}:{line}: not UTF-8 (byte 0x{content[error.start]:02x}, which is byte {place} "
            "of the line); convert the file, for example with: iconv -f LATIN1 -t UTF-8"
        ) from error
