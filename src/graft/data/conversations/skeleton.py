"""The answers' places in a conversation, from those in another of the same roles.

What stands between contents, and where answers begin and end in it, is the same in all
conversations of the same roles, unless a template looks at what they say. So it is found out once,
in a conversation of marks. If a row is what stands between them with its own contents, to the
letter, and its last prompt is its beginning, its answers stand as those do; else it is looked at
for itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graft.data.conversations.contents import Between, between, marked, places_of_contents
from graft.data.conversations.turns import Found, Place, Render, find_places
from graft.errors import GraftError

_KEYS = {"role", "content"}


@dataclass(frozen=True)
class Skeleton:
    """A conversation without its contents."""

    between: Between
    found: Found
    """Where the answers stand among the marks."""
    anchors: Mapping[int, tuple[tuple[int | None, int], tuple[int | None, int]]]
    """Where they begin and end: characters behind the end of which content."""

    def places(
        self,
        render: Render,
        messages: Sequence[Mapping[str, Any]],
        text: str,
        turns: Sequence[int],
        asked: bool,
    ) -> Found | None:
        """Return where a conversation's answers stand, or None where it is another one."""
        contents = places_of_contents(text, self.between, messages)
        if contents is None:
            return None
        ends: dict[int | None, int] = {number: end for number, (_, end) in contents.items()}
        ends[None] = 0
        found: Found = {}
        for turn in turns:
            place = self.found[turn]
            if isinstance(place, Place):
                (first, begin), (last, end) = self.anchors[turn]
                place = replace(place, start=ends[first] + begin, end=ends[last] + end)
            found[turn] = place
        if not asked and isinstance(last_place := found[turns[-1]], Place):
            before = render(messages[: turns[-1]], True)
            if len(before) != last_place.start or not text.startswith(before):
                return None
        return found


def skeleton_of(
    known: dict[Any, Any],
    key: object,
    render: Render,
    messages: Sequence[Mapping[str, Any]],
    turns: Sequence[int],
    asked: bool,
    eos: str,
) -> Skeleton | None:
    """Return the skeleton of conversations like this one; None where they have none.

    key: what is the same in all of them; `known` keeps the skeleton by it.
    """
    if any(not _KEYS.issuperset(message) or not message.get("content") for message in messages):
        return None
    place = ("skeleton", key, asked)
    if place not in known:
        known[place] = _made(render, messages, turns, asked, eos)
    found: Skeleton | None = known[place]
    return found


def _made(
    render: Render,
    messages: Sequence[Mapping[str, Any]],
    turns: Sequence[int],
    asked: bool,
    eos: str,
) -> Skeleton | None:
    marks = [marked(message, index) for index, message in enumerate(messages)]
    try:
        text = render(marks, asked)
    except GraftError:
        return None
    text = text if asked else text.rstrip()
    gaps = between(text)
    contents = None if gaps is None else places_of_contents(text, gaps, marks)
    if gaps is None or contents is None:
        return None
    found = find_places(render, marks, text, turns, asked, eos)
    anchors = {}
    for turn, place in found.items():
        if not isinstance(place, Place):
            if not place.other_prompt:
                return None
            continue
        ends = [_anchor(contents, at) for at in (place.start, place.end)]
        if None in ends:
            return None
        anchors[turn] = (ends[0], ends[1])
    return Skeleton(gaps, found, anchors)  # type: ignore[arg-type]


def _anchor(contents: Mapping[int, tuple[int, int]], at: int) -> tuple[int | None, int] | None:
    """Return a place as characters behind the end of the last content before it."""
    before: tuple[int | None, int] = (None, 0)
    for number, (start, end) in sorted(contents.items(), key=lambda one: one[1]):
        if start < at < end:
            return None
        if end <= at:
            before = (number, end)
    return before[0], at - before[1]
