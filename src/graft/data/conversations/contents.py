"""Where the contents of messages stand in a text, found with a text of marks in their places."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PART = "text"
"""The type of those parts of a content that are read."""
_MARK = re.compile("gq([0-9]{5,})zk")


def marked(message: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    """Return a message with a content that is found nowhere else."""
    mark = f"gq{index:05d}zk"
    is_text = isinstance(message.get("content", ""), str)
    return {**message, "content": mark if is_text else in_parts(mark)}


def in_parts(text: str) -> list[dict[str, str]]:
    """Return a text as a content in parts."""
    return [{"type": PART, "text": text}]


def text_of(message: Mapping[str, Any]) -> str:
    """Return a message's content as a text."""
    content = message.get("content", "")
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


@dataclass(frozen=True)
class Between:
    """What a template writes between contents: `first`, then each (message, what follows it)."""

    first: str
    rest: tuple[tuple[int, str], ...]


def between(text: str) -> Between | None:
    """Return what stands between the marks of a text; None where one of them is there twice."""
    first, *found = _MARK.split(text)
    numbers = [int(number) for number in found[::2]]
    if len(set(numbers)) < len(numbers):
        return None
    return Between(first, tuple(zip(numbers, found[1::2], strict=True)))


def places_of_contents(
    text: str, marks: Between, messages: Sequence[Mapping[str, Any]]
) -> dict[int, tuple[int, int]] | None:
    """Return where contents stand, as [start, end), if the text is they and what is between them.

    A content may be without the white space at its ends, or written as JSON. None where the text
    is anything else, but for white space at its end.
    """
    if not text.startswith(marks.first):
        return None
    reached = len(marks.first)
    found: dict[int, tuple[int, int]] = {}
    last = len(marks.rest) - 1
    for place, (number, behind) in enumerate(marks.rest):
        if number >= len(messages):
            return None
        end = _end(text, reached, text_of(messages[number]), behind, place == last)
        if end is None:
            return None
        found[number] = (reached, end)
        reached = end + len(behind)
    return found


def _end(text: str, begin: int, content: str, behind: str, is_last: bool) -> int | None:
    """Return where a content that begins at a place ends, before what stands behind it."""
    for written in (str, str.strip, str.lstrip, str.rstrip, _as_json):
        one = written(content)
        end = begin + len(one)
        if not text.startswith(one, begin):
            continue
        if is_last:
            if text[end:].rstrip() == behind.rstrip():
                return end
        elif text.startswith(behind, end):
            return end
    return None


def _as_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
