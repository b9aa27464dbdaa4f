"""Text in UTF-16, as Windows writes it, passed on as UTF-8."""

from __future__ import annotations

import codecs
from pathlib import Path

from graft.errors import GraftError

_MARKS = {
    b"\xff\xfe\0\0": "utf-32-le",
    b"\0\0\xfe\xff": "utf-32-be",
    b"\xff\xfe": "utf-16-le",
    b"\xfe\xff": "utf-16-be",
}


def encoding_of(begin: bytes) -> str | None:
    """Return the encoding that a file's first bytes show, or None: UTF-8, or what is none.

    A byte order mark shows it, or a zero byte beside each of the first two characters.
    """
    for mark, name in _MARKS.items():
        if begin.startswith(mark):
            return name
    zeros = [byte == 0 for byte in begin[:4]]
    if zeros == [False, True, False, True]:
        return "utf-16-le"
    if zeros == [True, False, True, False]:
        return "utf-16-be"
    return None


class Recoded:
    """Turns pieces of a file in UTF-16 or UTF-32 into pieces of UTF-8."""

    def __init__(self, encoding: str, path: Path) -> None:
        self._encoding = encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._path = path
        self._line = 1

    def utf8(self, piece: bytes, last: bool) -> bytes:
        """Return the next piece; raises GraftError with the line for what is not valid."""
        try:
            found = self._decoder.decode(piece, last).encode()
        except UnicodeDecodeError as error:
            good = error.object[: error.start].decode(self._encoding, "ignore")
            name = self._encoding.upper().removesuffix("-LE").removesuffix("-BE")
            raise GraftError(
                f"{self._path}: not valid {name} in line {self._line + good.count(chr(10))} "
                f"({error.reason}); save the file as UTF-8"
            ) from error
        self._line += found.count(b"\n")
        return found
