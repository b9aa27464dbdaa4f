"""Which of llama.cpp's tokenizers cuts text as a tokenizer.json does, if any."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from graft.export.gguf.byte_level import find_pre_tokenizer, unreachable
from graft.model.probe import probe_texts
from graft.understood import tokenizing

SPACE = "▁"
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {"type": "Prepend", "prepend": SPACE}


@dataclass(frozen=True)
class TokenizerKind:
    """A tokenizer of llama.cpp: 'gpt2' is byte-level BPE, 'llama' SentencePiece's BPE."""

    model: str
    pre: str
    add_space_prefix: bool = False
    notes: tuple[str, ...] = ()


def recognise(backend: Tokenizer, spec: dict[str, Any]) -> tuple[TokenizerKind | None, list[str]]:
    """Return the kind of a tokenizer, whose tokenizer.json says `spec`, or what hinders."""
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
        kind, found = _byte_level(backend, spec, steps)
    elif model["byte_fallback"]:
        kind, found = _sentencepiece(backend, spec, steps)
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
    backend: Tokenizer, spec: dict[str, Any], steps: list[dict[str, Any]]
) -> tuple[TokenizerKind | None, list[str]]:
    problems = []
    notes: tuple[str, ...] = ()
    normalizers = _steps(spec["normalizer"], "normalizers")
    composes = normalizers == [{"type": "NFC"}]
    if composes:
        notes = ("the tokenizer composes characters (NFC), which llama.cpp leaves as they are",)
    elif normalizers:
        problems.append(f"its normalizer is {spec['normalizer']}; expected none or NFC")
    if any(step.get("add_prefix_space") for step in steps):
        problems.append("it puts a space before every text (add_prefix_space), llama.cpp does not")
    if problems:
        return None, problems
    pre, cut_notes, problems = find_pre_tokenizer(backend, spec, composes)
    if pre is None:
        return None, problems
    return TokenizerKind("gpt2", pre, notes=notes + cut_notes), []


def _sentencepiece(
    backend: Tokenizer, spec: dict[str, Any], steps: list[dict[str, Any]]
) -> tuple[TokenizerKind | None, list[str]]:
    model = spec["model"]
    added = {entry["content"] for entry in spec["added_tokens"]}
    missed = unreachable(model, added) if model["ignore_merges"] else []
    missed = [token for token in missed if not _BYTE.fullmatch(token)]
    if missed:
        return None, [
            f"ignore_merges is True, in llama.cpp it is not; {len(missed)} tokens are cut "
            f"differently ({missed[0]!r} ...)"
        ]
    normalizers = _steps(spec["normalizer"], "normalizers")
    if normalizers in ([_PREPEND, _REPLACE], [_REPLACE]) and not _cuts(backend):
        return TokenizerKind("llama", "default", _PREPEND in normalizers), []
    metaspace = steps[0] if len(steps) == 1 and steps[0]["type"] == "Metaspace" else None
    if normalizers or metaspace is None or metaspace["replacement"] != SPACE:
        return None, [
            f"its normalizers {normalizers} and pre-tokenizers {steps} are not SentencePiece's: "
            "expected that spaces become '▁' and nothing else changes"
        ]
    inner = [token for token in spec["model"]["vocab"] if SPACE in token[1:]]
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


def _cuts(backend: Tokenizer) -> bool:
    """Return whether the pre-tokenizer cuts a text whose spaces have become '▁'.

    Gemma's, which cuts at spaces, finds none any more.
    """
    if backend.pre_tokenizer is None:
        return False
    with tokenizing():
        for text in probe_texts():
            spelt = text.replace(" ", SPACE)
            if backend.pre_tokenizer.pre_tokenize_str(spelt) != [(spelt, (0, len(spelt)))]:
                return True
    return False
