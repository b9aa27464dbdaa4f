"""llama.cpp's pre-tokenizers for byte-level BPE: how each of them cuts a text into words.

A name in a file's `tokenizer.ggml.pre` stands for a list of regular expressions. Each cuts what
the one before it left: what it matches is a word, and so is what lies between. Here they are
written as Oniguruma, which the tokenizers library runs, computes them; llama.cpp's own engine reads
white space beyond ASCII as a vertical tab, and for the letters of the newer expressions knows upper
and lower case in ASCII alone. `tests/peers` holds every row against llama.cpp itself.
"""

from __future__ import annotations

from dataclasses import dataclass

_SHORT = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = f"{_SHORT}|{_LETTERS}" + r"\p{N}{1,3}" + _OTHERS
_CUT_NUMBERS = r"\p{N}"
_THREE_DIGITS = r"[0-9][0-9][0-9]"
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    r" ?[\p{P}\p{S}]+[\r\n]*" + _SPACES
)
_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_EAST = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_EAST_BUT_SPACES = "[[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]&&[^\\s]]+"
_WIDE = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f{}-\u3002]+"
_LATIN = (
    r"\s?["
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293"
    "\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c"
    "\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5"
    "\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59"
    "\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc"
    "\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107"
    "\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee"
    "\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e"
    "\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
    "]+"
)


def _by_case(short: str, numbers: str, letter: str = r"\p{L}") -> str:
    """Return the expression that cuts camel case, with llama.cpp's idea of case."""
    upper, lower = rf"(?:(?=[{letter}])[^a-z])", rf"(?:(?=[{letter}])[^A-Z])"
    return _cased(upper, lower, short, numbers)


def _by_unicode_case(short: str, numbers: str) -> str:
    """Return the same as its tokenizers have it, with Unicode's case and marks."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    return _cased(upper, lower, short, numbers)


def _cased(upper: str, lower: str, short: str, numbers: str) -> str:
    before = r"[^\r\n\p{L}\p{N}]?"
    words = f"{before}{upper}*{lower}+{short}|{before}{upper}+{lower}*{short}|{numbers}"
    return words + r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES


@dataclass(frozen=True)
class PreTokenizer:
    """One way of llama.cpp's to cut a text."""

    name: str
    splits: tuple[str, ...]
    """What it computes."""
    published: tuple[str, ...] = ()
    """What the tokenizers do that it is for, where it does not compute quite that."""
    ignores_merges: bool = False
    """A word that is a token is taken as it is, merges or not."""


_THREE = r"\p{N}{1,3}"
_ANY_SHORT = f"{_SHORT}?"

PRE_TOKENIZERS = (
    PreTokenizer("gpt-2", (_GPT2,)),
    PreTokenizer("llama-bpe", (_LLAMA3,), ignores_merges=True),
    PreTokenizer("dbrx", (_LLAMA3,)),
    PreTokenizer("qwen2", (f"{_SHORT}|{_LETTERS}" + r"\p{N}" + _OTHERS,)),
    PreTokenizer(
        "qwen35",
        (
            _SHORT + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
    ),
    PreTokenizer("smollm", (_CUT_NUMBERS, _GPT2)),
    PreTokenizer(
        "tekken",
        (_by_case("", _CUT_NUMBERS),),
        (_by_unicode_case("", _CUT_NUMBERS),),
        ignores_merges=True,
    ),
    PreTokenizer(
        "gpt-4o", (_by_case(_ANY_SHORT, _THREE),), (_by_unicode_case(_ANY_SHORT, _THREE),)
    ),
    PreTokenizer("deepseek-v3", (_THREE, _KANA, _DEEPSEEK)),
    PreTokenizer(
        "deepseek-llm",
        (
            "[\r\n]",
            _LATIN,
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3001-\u3002]+",
            r"\s+$",
            _EAST_BUT_SPACES,
            r"\p{N}+",
        ),
        (
            "[\r\n]",
            _LATIN,
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _EAST,
            _CUT_NUMBERS,
        ),
    ),
    PreTokenizer(
        "deepseek-coder",
        ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_BUT_SPACES, _CUT_NUMBERS),
        ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST, _CUT_NUMBERS),
    ),
    PreTokenizer("falcon", (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, _THREE_DIGITS)),
    PreTokenizer("bloom", (_BLOOM,)),
    PreTokenizer("viking", (_BLOOM, _CUT_NUMBERS)),
    PreTokenizer(
        "chameleon",
        (
            r"<sentinel:[0-9]+>",
            r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            _CUT_NUMBERS,
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
    ),
    PreTokenizer(
        "seed-coder",
        (f"{_SHORT}|{_LETTERS}" + r"\p{N}| ?[^\s\p{L}\p{N}\r\n]+" + _SPACES,),
    ),
    PreTokenizer(
        "exaone-moe",
        (
            _SHORT + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}|"
            r" ?[^\s\p{L}\p{N}]+[\r\n/]?" + _SPACES,
        ),
    ),
    PreTokenizer("minicpm5", (_THREE, _LLAMA3), ignores_merges=True),
    PreTokenizer("ufakzeka", (f"{_LETTERS}" + r"\p{N}" + _OTHERS,)),
)
"""The first that cuts alike is taken: where several do, that which the most versions know.

Names that stand for the same are left out (of "gpt-2" alone there are eighteen), and so are those
that llama.cpp computes by code of its own, for models of kinds that are not exported.
"""
