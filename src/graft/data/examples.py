"""Examples: the tokens of a row as training takes them, cut to a length or into windows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graft.data.shapes.base import Rendered
from graft.data.storage.keys import Keys, keys_of, text_key
from graft.data.tokens import Tokens
from graft.errors import GraftError


@dataclass(frozen=True)
class Example:
    """A row as tokens; targets[i] says that token i is predicted and scored, never token 0."""

    input_ids: list[int]
    targets: list[bool]
    where: str
    cut: bool = False
    trains_eos: bool = False
    values: Mapping[str, Any] = field(default_factory=dict)
    """What the objective reads of the row besides its tokens; see `Rendered.values`."""
    lost: int = field(default=0, compare=False)
    """Tokens of the row that the cut took away."""
    window: int = field(default=0, compare=False)
    """Which of its row's windows it is, from 0; above 0 for a document that has several."""
    keys: Keys = field(default=Keys(), compare=False)
    """Those of its row, which all of its windows share."""


def sequences_of(example: Example) -> list[Example]:
    """Return an example's sequences, each as one of its own: itself, or the sides of a pair.

    The others lie behind the first in its tokens, and `values` say how long each is.
    """
    lengths = example.values.get("lengths")
    if lengths is None:
        return [example]
    found, begin = [], 0
    wanted: list[bool] = example.values.get("wanted", [])
    for number, length in enumerate(lengths):
        part = slice(begin, begin + length)
        ids, targets = example.input_ids[part], example.targets[part]
        values = {"wanted": wanted[number : number + 1]}
        found.append(Example(ids, targets, example.where, example.cut, values=values))
        begin += length
    return found


def side_names(example: Example) -> list[str]:
    """Return what each of an example's sequences is to a reader; '' where it is a plain row."""
    wanted: list[bool] = example.values.get("wanted", [])
    names = {True: "chosen", False: "rejected"}  # of a pair
    if len(wanted) == 1:
        names = {True: "wanted", False: "not wanted"}
    return [names[one] for one in wanted] or [""]


def _beside(sides: Sequence[Example], row: Rendered) -> Example:
    """Return the sequences of a row as one example, which holds one behind the other."""
    first = sides[0]
    texts = "\n".join([row.text, *(one.text for one in row.others)])
    return Example(
        [token for side in sides for token in side.input_ids],
        [target for side in sides for target in side.targets],
        first.where,
        any(side.cut for side in sides),
        any(side.trains_eos for side in sides),
        {**row.values, "lengths": [len(side.input_ids) for side in sides]},
        sum(side.lost for side in sides),
        keys=Keys(text_key(texts), first.keys.prompt),
    )


@dataclass(frozen=True)
class Cutting:
    """How long an example may be, and how a row ends."""

    max_length: int
    """Most tokens."""
    eos_id: int | None
    """The token that ends a sequence."""
    eos: bool = True
    """Whether it is appended to each row and trained, unless the row's text ends with it."""
    stride: int | None = None
    """Tokens from the beginning of a document's window to that of the next; None leaves out no
    token and repeats as few as can be."""

    def sides(self, where: str, row: Rendered, tokens: Sequence[Tokens]) -> Example:
        """Return a row of several sequences as one example, each cut to the same length.

        Raises GraftError when none of a sequence's trained tokens is left.
        """
        texts = (row, *row.others)
        found = [
            next(self.examples(where, text, one, is_document=False))
            for text, one in zip(texts, tokens, strict=True)
        ]
        for side in found:
            if not any(side.targets):
                raise GraftError(self.why_no_target(side))
        return _beside(found, row)

    def why_no_target(self, example: Example) -> str:
        """Return why an example trains nothing, and what to do."""
        if not example.cut:
            return f"{len(example.input_ids)} token(s), none of which is trained; remove the row"
        return (
            f"no trained token is left after the cut to {self.max_length} tokens; "
            "raise --max-length, or shorten or remove the row"
        )

    def examples(
        self, where: str, row: Rendered, tokens: Tokens, is_document: bool
    ) -> Iterator[Example]:
        """Yield a row's examples: one, or the windows of a document that is longer than one.

        Each window begins as every text does, with what the tokenizer puts before it. A token that
        two windows share is trained in the first of them alone, and only gives context in the next.
        """
        ids, trained, keys = tokens.ids, tokens.trained, keys_of(row)
        # The text may bring its own EOS, as chat templates do; then a second would be wrong.
        if self.eos and self.eos_id is not None and ids[-1:] != [self.eos_id]:
            ids, trained = [*ids, self.eos_id], [*trained, True]
        room = self.max_length - tokens.prefix
        if len(ids) <= self.max_length or not is_document or room < 2:
            lost = max(len(ids) - self.max_length, 0)
            yield self._example(where, row, ids, trained, keys, lost=lost)
            return
        prefix, text = ids[: tokens.prefix], ids[tokens.prefix :]
        untrained = [False] * len(prefix)
        asked = trained[tokens.prefix :]
        # Without a prefix a window's first token has nothing to be predicted from.
        step = min(self.stride or room, room if prefix else room - 1)
        done = 0
        for window, begin in enumerate(range(0, len(text), step)):
            end = min(begin + room, len(text))
            targets = [False] * (done - begin) + asked[max(begin, done) : end]
            part = prefix + text[begin:end]
            yield self._example(where, row, part, untrained + targets, keys, window=window)
            if end == len(text):
                return
            done = end

    def _example(
        self,
        where: str,
        row: Rendered,
        ids: list[int],
        trained: list[bool],
        keys: Keys,
        *,
        lost: int = 0,
        window: int = 0,
    ) -> Example:
        ids = ids[: self.max_length]
        targets = trained[: self.max_length]
        targets[:1] = [False] * len(targets[:1])
        # From the end, where it mostly is.
        trains_eos = self.eos_id in ids and any(
            target and token == self.eos_id
            for token, target in zip(reversed(ids), reversed(targets), strict=True)
        )
        return Example(ids, targets, where, bool(lost), trains_eos, row.values, lost, window, keys)
