"""Texts on which another program's tokenizer is compared with the model's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from graft.understood import tokenizing

PROBE = (
    "Once upon a time, there was a little girl who didn't like red apples.",
    "IT'S We'LL they've 'tis  o'clock",
    "  two spaces,   three\tand a tab \n\n\nthree lines\r\n and a trailing space ",
    "0 7 42 100 2024 1234567890 3.14159 1,000,000 50% $9.99 #tag @you",
    "def add(a, b):\n    return a + b  # sum\n\n\nprint(add(1, 2), '\\n', \"é\")\n",
    "https://example.org/a_b-c?d=e&f=%20g; C:\\dir\\file.txt <b>bold</b> {[(x)]} !!! ... --",
    "Größe naïve façade Ærøskøbing İstanbul e\u0301 ﬁ ½ ² Ⅷ",
    "Привет, мир! Ελληνικά שלום مرحبا بالعالم नमस्ते ภาษาไทย 한국어 日本語テキスト 中文字符123",
    "🙂👩‍👩‍👧 🏳️‍🌈 \u200bzero\u00a0width \u3000 ▁lower Ġbytes",
    "a",
    " ",
)
"""Words, contractions, white space, numbers, code, addresses, accents, scripts, emoji."""


def other_ids(
    texts: Sequence[str],
    ours: PreTrainedTokenizerBase,
    theirs: Callable[[str], Sequence[int]],
    special: bool = True,
) -> str | None:
    """Return the first text that the other tokenizer cuts otherwise; None where there is none.

    special: with the special tokens that ours puts around a text.
    """
    with tokenizing():
        for text in texts:
            if list(theirs(text)) != ours(text, add_special_tokens=special)["input_ids"]:
                return text
    return None
