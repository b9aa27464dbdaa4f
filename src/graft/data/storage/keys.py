"""Keys of rows: numbers by which the same text is found again among millions of rows."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from graft.data.shapes.base import Rendered


class Keys(NamedTuple):
    """64-bit numbers that are equal where texts are, but for white space and case; 0 for none."""

    row: int = 0
    prompt: int = 0
    """What stands before the first trained part."""


def keys_of(row: Rendered) -> Keys:
    """Return the keys of a rendered row."""
    begin = row.spans[0][0] if row.spans else len(row.text)
    return Keys(text_key(row.text), text_key(row.text[:begin]))


def text_key(text: str) -> int:
    """Return the key of a text; 0 for one of white space alone."""
    words = " ".join(text.lower().split())
    if not words:
        return 0
    digest = hashlib.blake2b(words.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
