"""Which of llama.cpp's tokenizers cuts text as a tokenizer.json does, if any."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

from tokenizers.models import BPE

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PRE_BY_REGEX = {
    _LETTERS + r"\p{N}{1,3}" + _REST: "llama-bpe",  # Llama 3
    _LETTERS + r"\p{N}" + _REST: "qwen2",
}
_IGNORES_MERGES = ("llama-bpe",)
"""Pre-tokenizers with which llama.cpp takes a word that is a token as it is, merges or not."""

_FALCON = [
    {"type": "Punctuation", "behavior": "Contiguous"},
    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    {"type": "Digits", "individual_digits": False},
    {
        "type": "Split",
        "pattern": {"Regex": "[0-9][0-9][0-9]"},
        "behavior": "Isolated",
        "invert": False,
    },
]
_SPACE = "▁"
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_PREPEND = {"type": "Prepend", "prepend": _SPACE}


@dataclass(frozen=True)
class TokenizerKind:
    """A tokenizer of llama.cpp: 'gpt2' is byte-level BPE, 'llama' SentencePiece's BPE."""

    model: str
    pre: str
    add_space_prefix: bool = False
    notes: tuple[str, ...] = ()


def recognise(spec: dict[str, Any]) -> tuple[TokenizerKind | None, list[str]]:
    """Return the kind of the tokenizer with the contents of tokenizer.json, or what hinders."""
    model = spec["model"]
    if model["type"] != "BPE":
        return None, [
            f"its model is {model['type']}; GGUF export knows BPE: byte-level, or with '▁' for a "
            "space and byte fallback"
        ]
    problems = [
        f"its model has {key} {model[key]!r}, which llama.cpp has not"
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        if model.get(key)
    ]
    steps = _steps(spec["pre_tokenizer"], "pretokenizers")
    if any(step["type"] == "ByteLevel" for step in steps):
        kind, found = _byte_level(spec, steps)
    elif model["byte_fallback"]:
        kind, found = _sentencepiece(spec, steps)
    else:
        kind, found = (
            None,
            [
                "it is neither byte-level nor has it byte fallback (pre-tokenizers: "
                f"{[step['type'] for step in steps]})"
            ],
        )
    problems += found
    return (kind, []) if not problems else (None, problems)


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


def _byte_level(
    spec: dict[str, Any], steps: list[dict[str, Any]]
) -> tuple[TokenizerKind | None, list[str]]:
    problems = []
    notes: tuple[str, ...] = ()
    if spec["normalizer"] is not None:
        if spec["normalizer"]["type"] != "NFC":
            problems.append(f"its normalizer is {spec['normalizer']}; expected none or NFC")
        notes = ("the tokenizer composes characters (NFC), which llama.cpp leaves as they are",)
    if steps[-1].get("add_prefix_space"):
        problems.append("it puts a space before every text (add_prefix_space), llama.cpp does not")
    pre = _pre_name(steps)
    if pre is None:
        problems.append(
            f"its pre-tokenizer, {' then '.join(map(_describe, steps))}, is not one of llama.cpp's "
            "that graft knows: GPT-2's (and Phi's), Falcon's, SmolLM's, Llama 3's or Qwen2's"
        )
        return None, problems
    model = spec["model"]
    if pre == "falcon":
        problems += _digit_problems(model)
    if bool(model["ignore_merges"]) != (pre in _IGNORES_MERGES):
        added = {entry["content"] for entry in spec["added_tokens"]}
        unreachable = _unreachable(model, added)
        if unreachable:
            problems.append(
                f"ignore_merges is {model['ignore_merges']}, in llama.cpp's {pre!r} it is not; "
                f"{len(unreachable)} tokens are cut differently ({unreachable[0]!r} ...)"
            )
    return TokenizerKind("gpt2", pre, notes=notes), problems


def _digit_problems(model: dict[str, Any]) -> list[str]:
    """Return what hinders where digits are cut off, which llama.cpp leaves to the merges."""
    mixed = [
        left + right
        for left, right in model["merges"]
        if len({letter.isnumeric() for letter in left + right}) > 1
    ]
    if not mixed:
        return []
    return [
        f"its pre-tokenizer cuts digits off, llama.cpp's does not, and {len(mixed)} tokens join "
        f"them with other letters ({mixed[0]!r} ...)"
    ]


def _pre_name(steps: list[dict[str, Any]]) -> str | None:
    if [{key: step[key] for key in step if key != "trim_offsets"} for step in steps] == _FALCON:
        return "falcon"
    *first, last = steps
    if last["type"] != "ByteLevel" or len(first) > 1:
        return None
    if not first:
        return "gpt-2" if last["use_regex"] else None
    if first[0]["type"] == "Digits":
        return "smollm" if first[0]["individual_digits"] and last["use_regex"] else None
    if first[0]["type"] != "Split" or last["use_regex"]:
        return None
    if first[0]["behavior"] != "Isolated" or first[0]["invert"]:
        return None
    return _PRE_BY_REGEX.get(first[0]["pattern"].get("Regex"))


def _describe(step: dict[str, Any]) -> str:
    if step["type"] != "Split":
        return str(step["type"])
    (pattern,) = step["pattern"].values()
    return f"Split by {pattern}"


def _unreachable(model: dict[str, Any], added: Set[str]) -> list[str]:
    """Return the tokens that the merges do not build from their own text; added ones need not."""
    merges = [tuple(pair) for pair in model["merges"]]
    bpe = BPE(vocab=model["vocab"], merges=merges, ignore_merges=False)
    words = (token for token in model["vocab"] if token not in added)
    return [word for word in words if len(bpe.tokenize(word)) != 1]


def _sentencepiece(
    spec: dict[str, Any], steps: list[dict[str, Any]]
) -> tuple[TokenizerKind | None, list[str]]:
    normalizers = _steps(spec["normalizer"], "normalizers")
    if not steps and normalizers in ([_PREPEND, _REPLACE], [_REPLACE]):
        return TokenizerKind("llama", "default", _PREPEND in normalizers), []
    metaspace = steps[0] if len(steps) == 1 and steps[0]["type"] == "Metaspace" else None
    if normalizers or metaspace is None or metaspace["replacement"] != _SPACE:
        return None, [
            f"its normalizers {normalizers} and pre-tokenizers {steps} are not SentencePiece's: "
            "expected that spaces become '▁' and nothing else changes"
        ]
    inner = [token for token in spec["model"]["vocab"] if _SPACE in token[1:]]
    if metaspace["split"] and inner:
        return None, [
            f"it cuts at every space (Metaspace with split), llama.cpp does not; {len(inner)} "
            f"tokens hold a '▁' inside ({inner[0]!r} ...)"
        ]
    scheme = metaspace["prepend_scheme"]
    notes = {
        "always": (
            "the tokenizer puts no '▁' before a text that begins with a space, llama.cpp does",
        ),
        "first": (
            "the tokenizer puts no '▁' before a text that begins with a space or follows a "
            "special token, llama.cpp does",
        ),
        "never": (),
    }[scheme]
    return TokenizerKind("llama", "default", scheme != "never", notes), []


def scores_by_merge(
    vocabulary: dict[str, int], merges: Sequence[Sequence[str]]
) -> tuple[dict[int, float], list[str]]:
    """Return each token's score, minus the rank of the first merge that makes it, by id.

    BPE merges the pair of the lowest rank; SentencePiece the neighbours whose union has the
    highest score. They agree when every two tokens whose union is a token are a merge, and the
    merges that make one token follow each other.
    """
    ranks: dict[str, list[int]] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, []).append(rank)
    known = {(left, right) for left, right in merges}
    differing = [
        token
        for token in vocabulary
        for cut in range(1, len(token))
        if token[:cut] in vocabulary
        and token[cut:] in vocabulary
        and (token[:cut], token[cut:]) not in known
    ]
    differing += [token for token, found in ranks.items() if found[-1] - found[0] >= len(found)]
    scores = {
        index: -float(ranks.get(token, [len(merges)])[0]) for token, index in vocabulary.items()
    }
    if not differing:
        return scores, []
    return scores, [
        f"its merges do not follow from scores of tokens, as SentencePiece's do: {len(differing)} "
        f"tokens ({differing[0]!r} ...) would be cut differently by llama.cpp"
    ]
