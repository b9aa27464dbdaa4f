"""The tokenizer that tokenizer.json is, where the class that a folder names would make another.

Transformers builds the classes that it knows (Llama's, Qwen2's, GPT-2's ...) anew from vocabulary
and merges, with the steps of that class in the place of those that tokenizer.json has: digits are
no longer cut apart, characters are composed, a text is cut as SentencePiece does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from graft.files.read import LARGE_JSON_BYTES, read_bytes
from graft.model.probe import probe_texts
from graft.understood import tokenizing

TOKENIZER_FILE = "tokenizer.json"
PLAIN_CLASS = "PreTrainedTokenizerFast"
"""That which reads tokenizer.json as it is; its name in older and newer versions."""
_PARTS = ("normalizer", "pre_tokenizer")
_FLAGS = ("byte_fallback", "ignore_merges", "dropout")
_SETTING = "add_prefix_space"
"""What a class or tokenizer_config.json may decide: Transformers always put it over the file's."""
_NOTE = "_graft_note"


def tokenizer_note(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return what is worth telling of how a tokenizer was read, in words."""
    note: str | None = getattr(tokenizer, _NOTE, None)
    return note


def as_the_file_says(tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer, or that of tokenizer.json where the two cut texts otherwise.

    Code of a folder's own is left to do what it does.
    """
    file = folder / TOKENIZER_FILE
    own_code = not type(tokenizer).__module__.startswith("transformers.")
    if own_code or not tokenizer.is_fast or not file.is_file():
        return tokenizer
    found: dict[str, Any] = json.loads(read_bytes(file, LARGE_JSON_BYTES))
    parts = Tokenizer.from_str(json.dumps(_without_words(found)))
    read = tokenizer.backend_tokenizer
    same_steps = all(_steps(parts, name) == _steps(read, name) for name in _PARTS)
    if same_steps and _same_model(found["model"], read):
        return tokenizer
    plain = PreTrainedTokenizerFast.from_pretrained(folder)
    if _same(read, plain.backend_tokenizer):
        return tokenizer
    setattr(
        plain,
        _NOTE,
        f"the tokenizer is read as {file.name} says: {type(tokenizer).__name__}, which "
        "Transformers would take, cuts texts otherwise",
    )
    return plain


def _without_words(found: dict[str, Any]) -> dict[str, Any]:
    """Return what makes the steps of a tokenizer and no more, which is quickly read."""
    model = {"type": "BPE", "vocab": {}, "merges": []}
    return {key: found.get(key) for key in _PARTS} | {"model": model, "added_tokens": []}


def _same_model(stated: dict[str, Any], read: Tokenizer) -> bool:
    """Return whether two models cut words alike, as far as their settings and sizes say."""
    kind = stated.get("type", type(read.model).__name__)  # which older files leave out
    flags = all(bool(stated.get(key)) == bool(getattr(read.model, key, None)) for key in _FLAGS)
    size = len(stated.get("vocab") or ())
    return kind == type(read.model).__name__ and flags and size == read.get_vocab_size(False)


def _steps(tokenizer: Tokenizer, name: str) -> str:
    part = getattr(tokenizer, name)
    if part is None:
        return ""
    return str(_unsettled(json.loads(part.__getstate__())))


def _unsettled(part: Any) -> Any:
    if isinstance(part, dict):
        return {key: _unsettled(value) for key, value in part.items() if key != _SETTING}
    return [_unsettled(value) for value in part] if isinstance(part, list) else part


def _same(a: Tokenizer, b: Tokenizer) -> bool:
    """Return whether two tokenizers make the same words of the probe, and the same tokens."""
    with tokenizing():
        return all(
            _words(a, text) == _words(b, text)
            and a.encode(text, add_special_tokens=False).ids
            == b.encode(text, add_special_tokens=False).ids
            for text in probe_texts()
        )


def _words(tokenizer: Tokenizer, text: str) -> list[str]:
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is None:
        return [text]
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
