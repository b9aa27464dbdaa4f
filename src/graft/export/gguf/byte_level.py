"""Which of llama.cpp's pre-tokenizers cuts text as a byte-level tokenizer does, found by trying."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence, Set
from itertools import accumulate
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import PreTokenizer as Steps

from graft.model.gguf.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from graft.model.probe import probe_texts
from graft.understood import tokenizing

_LETTERS = decoders.ByteLevel()
_NEAREST = 2
"""How many of the nearest are looked at token by token."""


class _Difference(NamedTuple):
    """A piece of text that is cut otherwise."""

    theirs: list[str]
    llama_cpp: list[str]

    def __str__(self) -> str:
        theirs, ours = ([_LETTERS.decode([word]) for word in words] for words in self)
        return f"{''.join(theirs)!r} into {theirs}, llama.cpp into {ours}"

    @classmethod
    def first(cls, theirs: list[str], ours: list[str]) -> _Difference:
        """Return the first words of two cuts of one text that are not the same in both."""
        start = next(
            i for i, pair in enumerate(zip(theirs, ours, strict=False)) if len({*pair}) > 1
        )
        ends = [_ends(words[start:]) for words in (theirs, ours)]
        common = sorted({*ends[0]} & {*ends[1]})
        last = common[0] if common else max(ends[0][-1], ends[1][-1])
        found = (
            words[start : start + sum(end <= last for end in own)]
            for words, own in zip((theirs, ours), ends, strict=True)
        )
        return cls(*found)


def _ends(words: Sequence[str]) -> list[int]:
    """Return where each word ends, in letters from the first."""
    return list(accumulate(len(word) for word in words))


def find_pre_tokenizer(
    backend: Tokenizer, spec: dict[str, Any], composes: bool
) -> tuple[str | None, tuple[str, ...], list[str]]:
    """Return the name of the pre-tokenizer, notes on what it does otherwise, or what hinders.

    composes: the tokenizer composes characters (NFC) first.
    """
    texts = probe_texts()
    if composes:
        texts = tuple(unicodedata.normalize("NFC", text) for text in texts)
    with tokenizing():
        theirs = [_words(backend.pre_tokenizer, text) for text in texts]
    hinders: list[str] = []
    distances: list[tuple[int, PreTokenizer]] = []
    for candidate in PRE_TOKENIZERS:
        notes: tuple[str, ...] = ()
        differences = list(_differences(candidate.splits, texts, theirs))
        if differences:
            distances.append((len(differences), candidate))
            if not candidate.published or any(_differences(candidate.published, texts, theirs)):
                continue
            notes = (_rounded_note(candidate.name, differences),)
        found = _merge_problems(spec, candidate)
        if not found:
            return candidate.name, notes, []
        hinders = hinders or found
    if hinders:
        return None, (), hinders
    distances.sort(key=lambda item: item[0])
    for _, candidate in distances[:_NEAREST]:
        found = _merge_problems(spec, candidate) or _token_problems(
            backend, spec, candidate, texts, theirs
        )
        if not found:
            return candidate.name, (), []
        hinders = hinders or found
    return None, (), hinders


def _words(steps: Steps, text: str) -> list[str]:
    """Return the words of a text, each byte a letter."""
    return [word for word, _ in steps.pre_tokenize_str(text)]


def _steps(splits: Sequence[str]) -> Steps:
    cut = [pre_tokenizers.Split(Regex(split), "isolated") for split in splits]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*cut, letters])


def _differences(
    splits: Sequence[str], texts: Sequence[str], theirs: Sequence[list[str]]
) -> Iterator[_Difference]:
    steps = _steps(splits)
    for text, words in zip(texts, theirs, strict=True):
        ours = _words(steps, text)
        if ours != words:
            yield _Difference.first(words, ours)


def _rounded_note(name: str, differences: Sequence[_Difference]) -> str:
    return (
        f"llama.cpp's pre-tokenizer {name!r}, the one for this tokenizer, cuts rare texts "
        "otherwise (letters beyond ASCII in upper case, combining marks, spaces beyond ASCII): the "
        f"tokenizer cuts {differences[0]}"
    )


def _merge_problems(spec: dict[str, Any], candidate: PreTokenizer) -> list[str]:
    """Return what hinders where one takes words that are tokens as they are, the other not."""
    model = spec["model"]
    if bool(model["ignore_merges"]) == candidate.ignores_merges:
        return []
    missed = unreachable(model, {entry["content"] for entry in spec["added_tokens"]})
    if not missed:
        return []
    return [
        f"ignore_merges is {model['ignore_merges']}, in llama.cpp's {candidate.name!r} it is not; "
        f"{len(missed)} tokens are cut differently ({missed[0]!r} ...)"
    ]


def unreachable(model: dict[str, Any], added: Set[str]) -> list[str]:
    """Return the tokens that the merges do not build from their own text; added ones need not."""
    bpe = _bpe(model, False)
    words = (token for token in model["vocab"] if token not in added)
    with tokenizing():
        return [word for word in words if len(bpe.tokenize(word)) != 1]


def _bpe(model: dict[str, Any], ignore_merges: bool) -> BPE:
    merges = [tuple(pair) for pair in model["merges"]]
    return BPE(vocab=model["vocab"], merges=merges, ignore_merges=ignore_merges)


def _token_problems(
    backend: Tokenizer,
    spec: dict[str, Any],
    candidate: PreTokenizer,
    texts: Sequence[str],
    theirs: Sequence[list[str]],
) -> list[str]:
    """Return what hinders where words differ: nothing, if no token reaches over a cut.

    Digits that a tokenizer cuts off, as Falcon's does, come out the same where its tokens hold
    digits alone.
    """
    bpe = _bpe(spec["model"], bool(spec["model"]["ignore_merges"]))
    with tokenizing():
        for difference in _differences(candidate.splits, texts, theirs):
            ids = [
                [token.id for word in words for token in bpe.tokenize(word)] for words in difference
            ]
            if ids[0] != ids[1]:
                return [_no_such(spec, candidate, difference)]
        steps = _steps(candidate.splits)
        for left, right in spec["model"]["merges"]:
            text = _LETTERS.decode([left + right]).replace("\ufffd", "")
            own, other = _words(backend.pre_tokenizer, text), _words(steps, text)
            if own != other:
                return [_no_such(spec, candidate, _Difference.first(own, other))]
    return []


def _no_such(spec: dict[str, Any], nearest: PreTokenizer, difference: _Difference) -> str:
    return (
        f"its pre-tokenizer, {_described(spec['pre_tokenizer'])}, is not one of llama.cpp's that "
        f"graft knows: it cuts {difference} by {nearest.name!r}, the nearest"
    )


def _described(part: dict[str, Any]) -> str:
    if part["type"] == "Sequence":
        return " then ".join(map(_described, part["pretokenizers"]))
    if part["type"] != "Split":
        return str(part["type"])
    (pattern,) = part["pattern"].values()
    return f"Split by {pattern:.200}"
