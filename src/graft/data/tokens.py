"""A row's token ids, in pieces that no token straddles.

Generation starts from the tokens of a prompt. Were prompt and answer tokenised as one text, a token
might begin in the one and end in the other (a newline and the spaces behind it, say), and the model
would be trained on a beginning that it is never asked to continue. So a text is cut where an answer
begins and ends, and each piece is tokenised for itself: what stands before an answer are, id by id,
the tokens that generation starts from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from graft.data.shapes.base import Rendered, Tokenizer
from graft.errors import GraftError
from graft.understood import tokenizing

_PROBE = "x"
_LOT_CHARACTERS = 2**20


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids, and which of them are trained; the first `prefix` were put before the text."""

    ids: list[int]
    trained: list[bool]
    prefix: int


class Encoder:
    """Tokenises rendered texts piece by piece: the tokenizer's own BOS once, no EOS of its own."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Find out what the tokenizer puts before a text.

        Raises GraftError when the tokenizer is a slow one, or fails.
        """
        check_fast(tokenizer)
        self._bos = tokenizer.bos_token
        with tokenizing():
            # This takes padding and truncation, which tokenizer.json may ask for, from the backend.
            tokenizer([_PROBE], add_special_tokens=True, padding=False, truncation=False)
            self._first: Any = tokenizer.backend_tokenizer
            whole = self._first.encode(_PROBE, add_special_tokens=True)
            self._rest = _continuing(self._first)
            self._added = _specials(self._first) if self._rest is not self._first else ()
        added = whole.special_tokens_mask
        of_text = next((index for index, flag in enumerate(added) if not flag), len(added))
        self._prefix: list[int] = whole.ids[:of_text]

    def encode(self, rows: Sequence[Rendered]) -> list[Tokens]:
        """Tokenise rows; raises GraftError when the tokenizer fails on a text."""
        pieces = [list(_pieces(row)) for row in rows]
        starts = [text for row in pieces for text, begin, _ in row if begin == 0]
        others = [text for row in pieces for text, begin, _ in row if begin > 0]
        with tokenizing():
            first = iter(self._ids(self._first, starts))
            rest = iter(self._continued(others))
        return [
            self._joined(row, found, first, rest) for row, found in zip(rows, pieces, strict=True)
        ]

    def _joined(
        self,
        row: Rendered,
        pieces: Sequence[tuple[str, int, bool]],
        first: Iterator[list[int]],
        rest: Iterator[list[int]],
    ) -> Tokens:
        # A text may bring its own BOS, as chat templates do; then a second would be wrong.
        own = bool(self._bos) and row.text.startswith(self._bos or "")
        ids = [] if own else list(self._prefix)
        prefix = len(ids)
        trained = [False] * prefix
        for _, begin, trains in pieces:
            found = next(rest if begin else first)
            ids += found
            trained += [trains] * len(found)
        return Tokens(ids, trained, prefix)

    def _continued(self, texts: list[str]) -> list[list[int]]:
        """Tokenise texts that others stand before: nothing is put before their first words."""
        if self._rest is self._first:
            return self._ids(self._first, texts)
        # Behind a special token the tokenizer goes on as it does in any text.
        places = [_first_of(text, self._added) for text in texts]
        heads = self._ids(self._rest, [text[:at] for text, at in zip(texts, places, strict=True)])
        tails = self._ids(self._first, [text[at:] for text, at in zip(texts, places, strict=True)])
        return [head + tail for head, tail in zip(heads, tails, strict=True)]

    def _ids(self, backend: Any, texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = []
        for lot in _lots(texts):
            encoded = backend.encode_batch_fast(lot, add_special_tokens=False)
            found += [one.ids for one in encoded]
        return found


def _lots(texts: list[str]) -> Iterator[list[str]]:
    """Yield texts in lots that do not take much memory: a character may take 150 bytes."""
    lot: list[str] = []
    characters = 0
    for text in texts:
        if lot and characters + len(text) > _LOT_CHARACTERS:
            yield lot
            lot, characters = [], 0
        lot.append(text)
        characters += len(text)
    if lot:
        yield lot


def check_fast(tokenizer: Tokenizer) -> None:
    """Raise GraftError when a tokenizer is not one of the tokenizers library."""
    if not tokenizer.is_fast:
        raise GraftError(
            "the tokenizer is a slow one, whose tokens depend on Python code; convert it to a fast "
            "one (a folder with tokenizer.json)"
        )


def _pieces(row: Rendered) -> Iterator[tuple[str, int, bool]]:
    """Yield what is tokenised apart: a part of the text, where it begins, whether it is trained."""
    ends = {place for span in row.spans for place in span}
    places = sorted({0, len(row.text), *ends, *row.seams})
    spans = iter(row.spans)
    span = next(spans, None)
    for begin, end in pairwise(places):
        while span is not None and span[1] <= begin:
            span = next(spans, None)
        yield row.text[begin:end], begin, span is not None and span[0] <= begin


def _first_of(text: str, tokens: Sequence[str]) -> int:
    """Return where the first of some special tokens begins in a text, or the text's length."""
    found = [place for token in tokens if (place := text.find(token)) >= 0]
    return min(found, default=len(text))


def _specials(backend: Any) -> tuple[str, ...]:
    """Return the texts of the tokens that stand outside the vocabulary proper."""
    return tuple(token.content for token in backend.get_added_tokens_decoder().values())


def _continuing(backend: Any) -> Any:
    """Return a tokenizer that puts nothing before a text: the one given, where it puts nothing.

    SentencePiece's kind begins each text with a space, so that an answer would have one more than
    its row. Raises GraftError when it is not known how to do without.
    """
    if _begun(backend) == _PROBE:
        return backend
    told = json.loads(backend.to_str())
    for part in _parts(told.get("normalizer")):
        if part.get("type") == "Prepend":
            part["prepend"] = ""
    for part in _parts(told.get("pre_tokenizer")):
        if part.get("type") == "Metaspace":
            part["prepend_scheme"] = "never"
        if part.get("type") == "ByteLevel":
            part["add_prefix_space"] = False
    copy = type(backend).from_str(json.dumps(told))
    copy.encode_special_tokens = backend.encode_special_tokens
    if (begun := _begun(copy)) != _PROBE:
        raise GraftError(
            f"the tokenizer writes {_PROBE!r} as {begun!r} before it makes tokens, in a way that "
            "graft does not know, so an answer's tokens would not be those that are generated; "
            "use another tokenizer.json of this model"
        )
    return copy


def _begun(backend: Any) -> str:
    """Return what a tokenizer makes tokens of when it is given the probe."""
    text: str = _PROBE
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer is not None:
        text = "".join(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    return text


def _parts(component: Any) -> Iterator[dict[str, Any]]:
    """Yield a component of tokenizer.json, and those in it."""
    if isinstance(component, dict):
        yield component
        for inner in (component.get("normalizers"), component.get("pretokenizers")):
            for part in inner or ():
                yield from _parts(part)
