"""Texts that tell ways of cutting a text apart."""

from __future__ import annotations

import random
from functools import cache

_WRITTEN = (
    "The quick brown fox jumps over the lazy dog, isn't it? She'll say: \"I'VE won!\"",
    "  two spaces first,  two inside and one last ",
    "tabs\tand\t\tmore\n\nnew lines\r\n  \n end\n",
    "\n\n  \n\tx = 1;\r\n\r\n    return x\n        \n",
    "0 12 345 6789 01234 567890 1234567 12345678 3.14159 1,234,567 $100% 2024-11-30 x2 2x v1.0b3",
    "don't DON'T we're WE'RE they'd I'm I'M you'll YOU'LL he's HE'S 'tis rock'n'roll a's'b 'sT'x",
    "I'Mx we'REx y'LLz a'Db 'Tx o'Sx 'sx 'vex 'VEx 'lle 'm1 'd2 x'n ' s '' t ''s ’s",
    "    a     b      c"
    + " " * 8
    + "d"
    + " " * 17
    + "e\n"
    + " " * 33
    + "f\n\n\n\n\n\n\tg\t\t\t\t\t\th"
    + " " * 70,
    "1" * 30
    + " "
    + "z" * 70
    + "Q" * 40
    + "=" * 40
    + "-" * 17
    + "/" * 9
    + "\n"
    + "#" * 5
    + "\n\n//\n/\n x/\n",
    "CamelCase camelCase HTTPServer parseJSONFile XMLHttpRequest iPhone McDonald aBcDeF ABCd",
    "snake_case __init__ _private kebab-case a.b.c a/b//c /usr/bin http://example.org/?q=1&r=2#f",
    "def add(a, b):\n    return a + b  # sum\n\n\nif __name__ == 'main':\n\tprint(add(1, 22))\n",
    '{"key": [1, 2.5, null], "a_b": "c\\n"}; <div class="x">&amp;</div> #include <a.h> @x !!! ...',
    "naïve café Ünïcode Ärger ÉCOLE École façade señor smørrebrød ångström œuvre",
    "Привет, мир! Съешь ещё. Ελληνικά κείμενα, Άλφα. Նոր հայ",
    "日本語のテキスト、カタカナ。漢字！ 中文字符，测试１２３。 한국어 텍스트입니다.",
    "שלום עולם مرحبا بالعالم ١٢٣ ۔ فارسی",
    "😀 🎉🎉 x🎉y → ≤ ∑ © ® ™ € £ ¥ «quoted» “curly” ‘single’ don’t – — … ·",
)
_MARKS = (
    "हिन्दी भाषा में १२३। ไทยภาษา ก็ดี ",
    "cafe\u0301 E\u0301cole a\u0308B \u0301",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f x\u200by",
    "a\u00a0b \u00a0c\u00a0 \u3000d\u2003e\u2028f\u2009 \u00a01 \u00a0\n\u00a0",
    "x\u00b2 \u2167 \u00bd 1\u00b2 \u0663\u0664 \u01c5a \u02b0B",
)
_LETTERS = (
    "aabsstTSBzZ''’1234  \t\n\n\r\".,:;/_-$+`!?#@(){}[]<>|=^~&%*\\é中がДд하ก"
    "\u0301\u00a0\u3000\u200bÉßǅʰ٣²Ⅷ🎉…，。«€ا،।\x1c"
)
_GENERATED, _LENGTH = 1500, 8


@cache
def probe_texts() -> tuple[str, ...]:
    """Return the texts: written ones, and sequences of letters of every kind, the same each time.

    No two ways that llama.cpp has give the same words for all of them.
    """
    numbers = random.Random(0)
    generated = (
        "".join(_LETTERS[int(numbers.random() * len(_LETTERS))] for _ in range(_LENGTH))
        for _ in range(_GENERATED)
    )
    return (*_WRITTEN, *_MARKS, *generated)
