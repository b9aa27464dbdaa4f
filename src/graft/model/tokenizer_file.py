"""What tokenizer.json would make of a text, looked at before it is used: how long it may become."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graft.errors import GraftError
from graft.files.bounds import bound, raise_beyond
from graft.files.read import LARGE_JSON_BYTES, read_bytes
from graft.text import quoted

GROWTH = 64
"""Characters that any one of a text may become; those of real tokenizers become three or so."""

_PARTS = ("normalizer", "pre_tokenizer", "decoder")
_INSIDE = ("normalizers", "pretokenizers", "decoders")
_NOT_PLAIN = re.compile(r"[\\^$.|?*+()\[\]{}]")


def check_growth(file: Path) -> None:
    """Raise GraftError when a tokenizer's file makes far more of a text than it is.

    Each of its replacements may take what the one before it wrote: 25 that double a letter make
    32 million of it.
    """
    content = read_bytes(file, LARGE_JSON_BYTES)
    try:
        found = json.loads(content, object_pairs_hook=_once)
    except GraftError as error:
        raise GraftError(f"{file} {error}") from error
    except (ValueError, RecursionError):
        return  # it is none, as its reader says
    for part in _PARTS if isinstance(found, dict) else ():
        try:
            growth = _growth(list(_steps(found.get(part))))
        except GraftError as error:
            raise GraftError(f"{file} {error}") from error
        if growth > bound(GROWTH):
            becomes = f"its {part} may make {growth:,.0f} characters of one"
            raise_beyond(file, becomes, f"{bound(GROWTH):,}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # and its readers differ in which of the two they take
        raise GraftError("names a key twice in one object; remove one of them")
    return found


def _steps(part: object) -> Iterator[dict[str, Any]]:
    """Yield the steps of a part that may grow a text, in their order."""
    waiting = [part]
    while waiting:
        step = waiting.pop()
        if step is None:
            continue
        if not isinstance(step, dict):
            raise GraftError(f"has a step {quoted(step)}; expected an object with its type")
        for key in _INSIDE:
            inner = step.get(key)
            waiting += reversed(inner) if isinstance(inner, list) else [inner]
        if "prepend" in step or "content" in step:
            yield step


def _growth(steps: list[dict[str, Any]]) -> float:
    """Return how many characters any one may become, at most.

    From the last step to the first, `lengths` is what a character becomes from there on.
    """
    lengths: dict[str, float] = {}
    every = 1.0  # of the characters that no step names
    for step in reversed(steps):
        written = step.get("prepend", step.get("content"))
        if not isinstance(written, str):
            continue
        length = sum(lengths.get(letter, every) for letter in written)
        replaced = _replaced(step.get("pattern")) if "prepend" not in step else None
        if replaced:
            for letter in set(replaced):
                own = lengths.get(letter, every)
                lengths[letter] = max(own, length / len(replaced))
        elif "prepend" in step or "pattern" in step:  # it may be put beside every character
            every += length
            for letter in lengths:
                lengths[letter] += length
    return max([every, *lengths.values()])


def _replaced(pattern: object) -> str | None:
    """Return the text that a pattern matches, or None when it may match any, or an empty one."""
    if not isinstance(pattern, dict):
        return None
    text, regex = pattern.get("String"), pattern.get("Regex")
    if isinstance(text, str):
        return text or None
    return regex if isinstance(regex, str) and regex and not _NOT_PLAIN.search(regex) else None
