"""Stop strings in texts that come in pieces, against a search in the whole text."""

from __future__ import annotations

import random

from tokenizers import Tokenizer, decoders, models

from graft.evaluate.stopping import HeldText, Stops


def first(text: str, strings: list[str]) -> str:
    for end in range(len(text) + 1):
        for begin in range(end):
            if text[begin:end] in strings:
                return text[:begin]
    return text


def test_a_stream_is_handed_on_up_to_the_string_that_is_complete_first() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        text = "".join(draw.choices("abc", k=draw.randrange(1, 25)))
        strings = ["".join(draw.choices("abc", k=draw.randrange(1, 6))) for _ in range(3)]
        heard: list[str] = []
        held, place = HeldText(strings, heard.append), 0
        while place < len(text):
            size = draw.randrange(1, 5)
            held(text[place : place + size])
            place += size
            # What was handed on is never taken back, and nothing waits that could not be a stop.
            assert first(text, strings).startswith("".join(heard))
            waits = len(first(text[:place], strings)) - len("".join(heard))
            assert waits < max(map(len, strings))
        held.end()
        assert "".join(heard) == first(text, strings)


def test_a_text_ends_with_the_token_that_completes_a_string() -> None:
    draw = random.Random(1)
    pieces = ["<s>", *(chr(97 + n) for n in range(3)), "ab", "ca", "<0xC3>", "<0xA4>", "bcab"]
    words = Tokenizer(models.WordLevel({piece: n for n, piece in enumerate(pieces)}, "<s>"))
    words.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])

    def decode(ids: list[int]) -> str:
        return words.decode([token for token in ids if token], skip_special_tokens=False)

    found = 0
    for _ in range(400):
        tokens = draw.choices(range(len(pieces)), k=30)
        strings = ["".join(draw.choices("abcä", k=draw.randrange(2, 6))) for _ in range(2)]
        stops = Stops(strings, decode, {0})
        ends = [n for n in range(1, 31) if any(one in decode(tokens[:n]) for one in strings)]
        told = [n for n in range(1, 31) if stops.reached(tokens[:n])]
        assert told[:1] == ends[:1]
        found += bool(ends)
        assert stops.cut(decode(tokens)) == first(decode(tokens), strings)
    assert 100 < found < 400


def test_without_strings_nothing_ends() -> None:
    stops = Stops([], lambda ids: "text", [])
    assert not stops.reached([1, 2]) and stops.cut("text") == "text"
