"""How data sets lay out their rows: by which keys one is known, and how it becomes one of a shape.

The first layout that fits a row is taken, so the order of the table is the order of preference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from graft.data.shapes import conversions as to
from graft.data.shapes.base import Holds
from graft.data.shapes.registry import SHAPES


@dataclass(frozen=True)
class RowLayout:
    """One way to lay out a row."""

    kind: str
    """The name of the shape that its rows become."""
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    convert: to.Conversion | None = None
    """Makes the shape's keys of a row; None: the row has them already."""
    fits: to.Test | None = None
    """Whether the values of a row are those of this layout; None: its keys are enough."""
    said: str | None = None
    """What a user should know of how such rows are read."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """The column that a key of the shape is read from, where it is called otherwise."""

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys that are read."""
        return self.required + self.optional


def layouts(holds: Sequence[Holds] = ("answers",)) -> tuple[RowLayout, ...]:
    """Return the layouts of rows to learn from, by preference; an added shape comes first."""
    built_in = {one.kind for table in _LAYOUTS.values() for one in table}
    added = [_own(name) for name in SHAPES if name not in built_in and SHAPES[name].holds in holds]
    return (*added, *(one for name in holds for one in _LAYOUTS[name]))


def _own(name: str, *beside: str) -> RowLayout:
    """Return the layout of rows that have a shape's keys."""
    shape = SHAPES[name]
    return RowLayout(name, shape.required, tuple(dict.fromkeys((*shape.optional, *beside))))


_CONVERSATIONS = (
    *("messages", "conversations", "conversation", "dialog", "dialogue", "turns", "chat"),
)
_BESIDE = (*to.SYSTEM, *to.FOR_TEMPLATES)
_GIVEN = ("input", "context")
_ANSWERS = ("output", "response", "answer", "completion")
_ASKED = ("prompt", "question", "query", "instruction", "input")
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("prompt", "output"),
    ("prompt", "chosen"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("problem", "solution"),
    ("problem", "answer"),
    ("input", "output"),
    ("input", "target"),
    ("inputs", "targets"),
    ("source", "target"),
    ("user", "assistant"),
    ("mr", "ref"),
    ("meaning_representation", "human_reference"),
)
_CHOSEN = "rows of preferences: 'chosen' is trained as the answer, 'rejected' is not"
_IMPLICIT = "rows of two texts: their prompt is what both begin with, up to white space"


def _conversations() -> Iterator[RowLayout]:
    for key in _CONVERSATIONS:
        # What is wrong with the value of a shape's own key is told, so it fits whatever it holds.
        fits = None if key in SHAPES else to.is_list(key)
        named = {"messages": key}
        yield RowLayout("messages", (key,), _BESIDE, to.turns(key), fits, columns=named)
    fits = to.is_spoken("prompt", "completion")
    convert = to.joined("prompt", "completion")
    yield RowLayout("messages", ("prompt", "completion"), _BESIDE, convert, fits)


def _preferences(side: to.Side = to.CHOSEN) -> Iterator[RowLayout]:
    """Yield layouts of rows with two answers, of which one side is taken."""
    pair, answer = to.CHOSEN, side[0]
    for key in _CONVERSATIONS:
        fits = to.is_answer_to(key)
        yield RowLayout("messages", (key, *pair), _BESIDE, to.preferred(key, side), fits, _CHOSEN)
    for key in _ASKED:
        fits = to.is_spoken(key, "chosen")
        yield RowLayout("messages", (key, *pair), _BESIDE, to.preferred(key, side), fits, _CHOSEN)
    fits = to.is_spoken("chosen")
    yield RowLayout("messages", pair, _BESIDE, to.preferred_whole(side), fits, _CHOSEN)
    for key in _ASKED:
        given = _GIVEN if key == "instruction" else ()
        chat = to.exchange(key, answer, given)
        for system in to.SYSTEM:
            beside = (*given, "history")
            yield RowLayout("messages", (key, *pair, system), beside, chat, None, _CHOSEN)
        if given:
            plain = to.instruction(key, given, answer)
            named = {"output": "chosen"}
            yield RowLayout("instruction", (key, *pair), given, plain, None, _CHOSEN, named)
        else:
            plain = to.renamed(prompt=key, completion=answer)
            named = {"prompt": key, "completion": "chosen"}
            yield RowLayout("prompt", (key, *pair), (), plain, None, _CHOSEN, named)
    transcript = to.preferred_transcript(side)
    yield RowLayout("messages", pair, (), transcript, to.is_transcript, _CHOSEN)


def _pairs_of_answers() -> Iterator[RowLayout]:
    """Yield the layouts of preferences with both answers."""
    for chosen, rejected in zip(_preferences(), _preferences(to.REJECTED), strict=True):
        assert chosen.convert is not None and rejected.convert is not None
        convert = to.paired(chosen.convert, rejected.convert)
        yield replace(chosen, kind=f"{chosen.kind}_pair", convert=convert, said=None)
    yield RowLayout("prompt_pair", to.CHOSEN, (), to.parted, to.are_texts, _IMPLICIT)


def _instructions() -> Iterator[RowLayout]:
    for answer in _ANSWERS:
        chat = to.exchange("instruction", answer, _GIVEN)
        for beside in ("history", *to.SYSTEM):
            keys = (*to.SYSTEM, "history", *_GIVEN)
            yield RowLayout("messages", ("instruction", answer, beside), keys, chat)
        plain = to.instruction("instruction", _GIVEN, answer)
        named = {"output": answer}
        yield RowLayout("instruction", ("instruction", answer), _GIVEN, plain, columns=named)
    plain = to.instruction("question", ("context",), "answer")
    named = {"instruction": "question", "input": "context", "output": "answer"}
    yield RowLayout("instruction", tuple(named.values()), (), plain, columns=named)


def _pairs() -> Iterator[RowLayout]:
    for asked, answer in _PAIRS:
        chat = to.exchange(asked, answer)
        for beside in ("history", *to.SYSTEM):
            keys = (*to.SYSTEM, "history")
            yield RowLayout("messages", (asked, answer, beside), keys, chat)
        named = {"prompt": asked, "completion": answer}
        yield RowLayout("prompt", (asked, answer), (), to.renamed(**named), columns=named)


def _judged() -> Iterator[tuple[str, RowLayout]]:
    """Yield layouts with a key that says whether an answer is a wanted one, and that key."""
    for layout in (*_conversations(), RowLayout("prompt", ("prompt", "completion"))):
        for key in ("label", "kto_tag"):
            required = (*layout.required, key)
            yield key, replace(layout, required=required, fits=to.is_truth(key, layout.fits))


def _wanted() -> Iterator[RowLayout]:
    """Yield layouts of judged rows of which those with a wanted answer are taken."""
    for key, layout in _judged():
        said = f"rows in which {key!r} is false are left out, as their answers are not wanted"
        yield replace(layout, convert=to.wanted(key, layout.convert), said=said)


def _labelled() -> Iterator[RowLayout]:
    """Yield layouts of judged rows with their judgement."""
    for key, layout in _judged():
        convert = to.labelled(key, layout.convert)
        yield replace(layout, kind=f"{layout.kind}_labelled", convert=convert)


_LAYOUTS: dict[Holds, tuple[RowLayout, ...]] = {
    "answers": (
        *_preferences(),
        *_wanted(),
        *_conversations(),
        *_instructions(),
        *_pairs(),
        RowLayout("text", ("text",)),
    ),
    "pairs": tuple(_pairs_of_answers()),
    "judgements": tuple(_labelled()),
}
