"""A row as a reader sees it: the text of each token, whether it is trained, whether special."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from graft.data.examples import Example
from graft.understood import tokenizing

_BROKEN = "\ufffd"
_BEFORE = "x"
"""Stands before a token that is decoded alone, which keeps the space that it may begin with."""
_MOST_JOINED = 8
"""Tokens that may share a character."""


@dataclass(frozen=True)
class Piece:
    """A token, or the few tokens that one character is made of."""

    text: str
    ids: tuple[int, ...]
    trained: bool
    special: bool
    """Whether it is a token that no text becomes by chance, such as the end of sequence."""


def pieces_of(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Return an example's tokens with their texts."""
    decode = _decoder(tokenizer)
    special = set(tokenizer.all_special_ids) | {
        token for token, added in tokenizer.added_tokens_decoder.items() if added.special
    }
    ids, targets = example.input_ids, example.targets
    spelt = [str(token) for token in tokenizer.convert_ids_to_tokens(ids)]
    found = []
    begin = 0
    with tokenizing():
        while begin < len(ids):
            end, text = begin + 1, spelt[begin]
            if ids[begin] not in special:
                # A token may be a part of a character, whose other parts follow.
                for after in range(begin + 1, min(begin + _MOST_JOINED, len(ids)) + 1):
                    if targets[after - 1] is not targets[begin] or ids[after - 1] in special:
                        break
                    if _BROKEN not in (decoded := decode(spelt[begin:after])):
                        end, text = after, decoded
                        break
            found.append(Piece(text, tuple(ids[begin:end]), targets[begin], ids[begin] in special))
            begin = end
    return found


def _decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[str]], str]:
    """Return a function from the tokens of a vocabulary to their text."""
    decoder: Any = tokenizer.backend_tokenizer.decoder
    if decoder is None:
        return "".join
    return lambda tokens: str(decoder.decode([_BEFORE, *tokens])).removeprefix(_BEFORE)


def stretches(pieces: Sequence[Piece]) -> list[tuple[bool, list[Piece]]]:
    """Return the pieces in stretches of trained ones and of others."""
    found: list[tuple[bool, list[Piece]]] = []
    for piece in pieces:
        if not found or found[-1][0] != piece.trained:
            found.append((piece.trained, []))
        found[-1][1].append(piece)
    return found


def one_line(pieces: Sequence[Piece], most: int = 60, longest: int = 300) -> str:
    """Return a row in one line, trained stretches in brackets, long ones by their two ends."""
    parts = []
    for trained, some in stretches(pieces):
        text = visible("".join(piece.text for piece in some)).replace("\n", "")
        text = _shortened(text, most)
        parts.append(f"[{text}]" if trained else text)
    return _shortened("".join(parts), longest)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


_SHOWN = {"\n": "↵\n", "\t": "⇥", " ": "·"}


def visible(text: str) -> str:
    r"""Return a text whose white space is seen: · ↵ ⇥, others spelt, as in \xa0 and \u200b."""
    return "".join(
        _SHOWN.get(one) or (one if one.isprintable() else ascii(one)[1:-1]) for one in text
    )
