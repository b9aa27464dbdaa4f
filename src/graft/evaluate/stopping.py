"""Where a text ends: at the first of some strings, wherever the borders of tokens lie."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

Decode = Callable[[Sequence[int]], str]


class Stops:
    """Finds stop strings in a text that comes token by token.

    A text ends before the first stop string in it. `decode` gives the text of tokens, `special`
    are those that have none.
    """

    def __init__(self, strings: Sequence[str], decode: Decode, special: Collection[int]) -> None:
        self._strings, self._decode = tuple(strings), decode
        self._special = frozenset(special)
        # Each token that has text has a byte of it at least. A character in parts, or the space
        # that a tokenizer leaves out in front, is told wrong in the first of the tokens that are
        # looked at, and never where a string may begin.
        self._window = max((len(one.encode()) for one in self._strings), default=0) + 4

    def reached(self, tokens: Sequence[int]) -> bool:
        """Return whether the text of some tokens holds a stop string that ends in the last one."""
        if not self._strings or not tokens:
            return False
        seen: list[int] = []
        for token in reversed(tokens):
            if token not in self._special:
                seen.append(token)
            if len(seen) == self._window:
                break
        tail = self._decode(seen[::-1])
        return any(one in tail for one in self._strings)

    def cut(self, text: str) -> str:
        """Return a text up to its first stop string."""
        return _before_first(text, self._strings)

    def held(self, on_text: Callable[[str], None]) -> HeldText:
        """Return a listener that hands a stream's pieces on, up to the first stop string."""
        return HeldText(self._strings, on_text)


class HeldText:
    """Hands on a stream of pieces, holding back what may be the beginning of a stop string."""

    def __init__(self, strings: Sequence[str], on_text: Callable[[str], None]) -> None:
        self._strings, self._on_text = tuple(strings), on_text
        self._held, self._ended = "", False

    def __call__(self, piece: str) -> None:
        """Take the next piece of the text."""
        if self._ended:
            return
        self._held += piece
        whole = _before_first(self._held, self._strings)
        self._ended = len(whole) < len(self._held)
        self._hand_on(len(whole) if self._ended else len(self._held) - self._beginning())

    def end(self) -> None:
        """Let go of what is held: no more follows."""
        if not self._ended:
            self._hand_on(len(self._held))

    def _hand_on(self, length: int) -> None:
        text, self._held = self._held[:length], self._held[length:]
        if text:
            self._on_text(text)

    def _beginning(self) -> int:
        """Return the length of the longest end of what is held that a stop string begins with."""
        longest = max(map(len, self._strings), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(one.startswith(self._held[-length:]) for one in self._strings):
                return length
        return 0


def _before_first(text: str, strings: Sequence[str]) -> str:
    """Return what stands before the string that is complete first; of several, the longest.

    So it does not matter in which pieces the text comes.
    """
    found = [(place + len(one), place) for one in strings if (place := text.find(one)) >= 0]
    return text[: min(found)[1]] if found else text
