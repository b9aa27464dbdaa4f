"""Examples: the tokens of a row as training takes them, cut to a length or into windows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from graft.data.shapes.base import Rendered
from graft.data.storage.keys import Keys, keys_of
from graft.data.tokens import Tokens


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
