"""Where the answers of a conversation stand in its text: by position, never by their words.

An answer begins where the template, given the messages before it, asks for one, and ends where the
template, given it too, ends. Two renderings for each answer say this exactly, and take quadratic
time. In a conversation of many turns the answers stand between contents whose places are known
from one rendering more, so what stands between a content and an answer is learnt from a few.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from os.path import commonprefix
from typing import Any

from graft.data.conversations.contents import between, marked, places_of_contents, text_of
from graft.errors import GraftError

FEW_ANSWERS = 8
"""So many are rendered one by one."""
_MOST_KINDS = 12

Render = Callable[[Sequence[Mapping[str, Any]], bool], str]
"""(messages, whether to ask for an answer) -> text."""


@dataclass(frozen=True)
class Place:
    """[start, end) of an answer, with its end-of-turn token."""

    start: int
    end: int
    shortened: str = ""
    """What the template leaves out of the answer once more messages follow: its thoughts."""
    endless: bool = False
    """Whether its end is not in it, as the template writes another once more messages follow."""


@dataclass(frozen=True)
class Misplaced:
    """Why an answer has no place."""

    reason: str
    other_prompt: bool = False
    """Whether what stands before it is not what generation starts from."""


Found = dict[int, Place | Misplaced]


def find_places(
    render: Render,
    messages: Sequence[Mapping[str, Any]],
    text: str,
    turns: Sequence[int],
    asked: bool,
    eos: str = "",
) -> Found:
    """Return where the answers `turns` stand in the text of messages.

    asked: whether the text ends with the opening of another answer. eos: the token that some
    templates write behind the last message alone.
    """
    if len(turns) > FEW_ANSWERS:
        found = _Aligned(render, messages, text, turns, asked, eos).places()
        if found is not None:
            return found
    whole = None if asked else len(messages) - 1
    return {turn: _place(render, messages, text, turn, turn == whole, eos) for turn in turns}


def _place(
    render: Render,
    messages: Sequence[Mapping[str, Any]],
    text: str,
    turn: int,
    is_last: bool,
    eos: str,
) -> Place | Misplaced:
    """Return where one answer stands, from the messages before it and those through it."""
    try:
        before = render(messages[:turn], True)
        through = text if is_last else render(messages[: turn + 1], False)
    except GraftError as error:
        return Misplaced(str(error))
    start = len(before)
    if not through.startswith(before) or not text.startswith(before):
        return _other_prompt(turn)
    # White space after the turn's end belongs to what follows.
    answer = through[start:].rstrip()
    message = messages[turn]
    if is_last or text.startswith(answer, start):
        return Place(start, start + len(answer))
    if eos and text.startswith(shorter := answer.removesuffix(eos).rstrip(), start):
        answer = shorter
    if (place := _without_thought(text, start, answer, message)) is not None:
        return place
    tail = _tail(render, messages, turn)
    if tail and answer.endswith(tail):
        place = _without_thought(text, start, answer.removesuffix(tail), message)
        if place is not None:
            return replace(place, endless=True)
    return Misplaced(
        f"message {turn + 1}: the chat template renders this answer differently once more "
        "messages follow; make each answer the last message of a row of its own"
    )


def _without_thought(
    text: str, start: int, answer: str, message: Mapping[str, Any]
) -> Place | None:
    """Return the place of an answer in a text that may leave out one part of it."""
    said = text[start : start + len(answer)]
    same = len(commonprefix([said, answer]))
    at = same
    rest, behind = said[same:], answer[same:]
    while not rest.startswith(behind):
        at = answer.find(rest[0], at + 1) if rest else len(answer)
        if at < 0:
            return None
        behind = answer[at:]
    found = said[: same + len(behind)]
    if not found or not _holds(found, message):
        return None
    return Place(start, start + len(found), answer[same:at])


def _tail(render: Render, messages: Sequence[Mapping[str, Any]], turn: int) -> str:
    """Return what the template writes behind the content of an answer that is the last message."""
    if not text_of(messages[turn]):
        return ""
    mark = marked(messages[turn], turn)
    try:
        through = render([*messages[:turn], mark], False)
    except GraftError:
        return ""
    return through.rstrip().rpartition(text_of(mark))[2]


def _other_prompt(turn: int) -> Misplaced:
    return Misplaced(
        f"message {turn + 1}: the chat template does not render the messages before it, with its "
        "generation prompt, as the beginning of the conversation, so the model would be trained on "
        "another prompt than it is asked; choose another template (--chat-template), set its "
        "variables for the row (chat_template_kwargs), or give the rows as prompt, completion",
        other_prompt=True,
    )


def _holds(text: str, message: Mapping[str, Any]) -> bool:
    """Return whether a text has all that a message says besides its thoughts."""
    content = text_of(message)
    names = [call["function"]["name"] for call in message.get("tool_calls", ())]
    return all(one in text for one in (content.rpartition("</think>")[2].strip(), *names))


class _Aligned:
    """The answers of a long conversation, found between the contents of the other messages."""

    def __init__(
        self,
        render: Render,
        messages: Sequence[Mapping[str, Any]],
        text: str,
        turns: Sequence[int],
        asked: bool,
        eos: str,
    ) -> None:
        self._render, self._messages, self._text = render, messages, text
        self._turns, self._asked, self._eos = turns, asked, eos

    def places(self) -> Found | None:
        """Return all places, or None where too little is known to be certain."""
        try:
            contents = self._contents()
        except GraftError:
            return None
        last = len(self._messages) - 1
        kinds: dict[tuple[str, str], list[int]] = {}
        found: Found = {}
        for turn in self._turns:
            if turn == last:
                continue
            if turn == 0 or turn - 1 not in contents or turn + 1 not in contents:
                return None
            if contents[turn - 1][1] > contents[turn + 1][0]:
                return None
            roles = (self._messages[turn - 1]["role"], self._messages[turn + 1]["role"])
            kinds.setdefault(roles, []).append(turn)
        if len(kinds) > _MOST_KINDS:
            return None
        witnesses = {turn for turns in kinds.values() for turn in turns[:2]}
        at = len(self._turns) - 1
        while at > 0:  # each at half of the text of the one before: all together at twice one
            witnesses.add(self._turns[at])
            at //= 2
        for turn in sorted(witnesses):
            is_last = turn == last and not self._asked
            place = _place(self._render, self._messages, self._text, turn, is_last, self._eos)
            if isinstance(place, Misplaced) and not place.other_prompt:
                return None
            found[turn] = place
        for turns in kinds.values():
            if not self._fill(turns, contents, found):
                return None
        ordered = {turn: found[turn] for turn in self._turns}
        places = [place for place in ordered.values() if isinstance(place, Place)]
        if any(one.end > other.start for one, other in pairwise(places)):
            return None
        return ordered

    def _fill(
        self, turns: Sequence[int], contents: Mapping[int, tuple[int, int]], found: Found
    ) -> bool:
        """Add the places of turns of one kind; return whether all stand as the witnesses do."""
        text = self._text
        learnt: set[tuple[str, str] | None] = set()
        told = Place(0, 0)
        for turn in turns:
            place = found.get(turn)
            if isinstance(place, Place):
                begin, end = contents[turn - 1][1], contents[turn + 1][0]
                learnt.add((text[begin : place.start], text[place.end : end]))
                told = Place(0, 0, told.shortened or place.shortened, place.endless)
            elif place is not None:
                learnt.add(None)
        if len(learnt) != 1:
            return False
        (ends,) = learnt
        if ends is None:
            found.update({turn: _other_prompt(turn) for turn in turns})
            return True
        head, tail = ends
        for turn in turns:
            begin, end = contents[turn - 1][1], contents[turn + 1][0]
            start, stop = begin + len(head), end - len(tail)
            if not text.startswith(head, begin) or not text.endswith(tail, 0, end) or start >= stop:
                return False
            found.setdefault(turn, replace(told, start=start, end=stop))
        return True

    def _contents(self) -> dict[int, tuple[int, int]]:
        """Return where the contents stand that are not the assistant's, as [start, end).

        There are none where the text is not what stands between marks in their places, and they.
        """
        marks = [
            message if message["role"] == "assistant" else marked(message, index)
            for index, message in enumerate(self._messages)
        ]
        gaps = between(self._render(marks, self._asked))
        found = None if gaps is None else places_of_contents(self._text, gaps, self._messages)
        return found or {}
