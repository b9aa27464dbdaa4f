"""The tokenizer that a GGUF file describes: its tokens, merges or scores, and special ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gguf import TokenType

from graft.errors import GraftError
from graft.model.gguf.file import GgufFile
from graft.text import quoted

_KEYS = "tokenizer.ggml."
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_USUAL = {"bos": 1, "eos": 2, "unk": 0}
"""llama.cpp's ids for SentencePiece's tokenizers where a file names none."""
_STARTS = frozenset(
    {"llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "tekken", "lfm2"}
)
"""Pre-tokenizers with which llama.cpp begins a text with BOS unless the file says otherwise."""


@dataclass(frozen=True)
class TokenList:
    """What a file says of its tokenizer, with llama.cpp's defaults."""

    model: str
    """'gpt2' is byte-level BPE, 'llama' SentencePiece's BPE; there are others."""
    pre: str
    texts: list[str]
    """Of each id; a byte-level token has a letter for each byte."""
    types: list[int]
    """Of each id, a `gguf.TokenType`."""
    scores: list[float]
    """Of each id; none in byte-level BPE."""
    merges: list[str]
    """Two tokens with a space between them, the first to be merged first."""
    special_ids: dict[str, int]
    """Of bos, eos, unk and pad, as far as there are."""
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | dict[str, str] | None

    def of_type(self, *types: TokenType) -> list[int]:
        """Return the ids of tokens of these types."""
        return [index for index, kind in enumerate(self.types) if kind in types]


def read_tokens(file: GgufFile) -> TokenList | None:
    """Return the file's tokenizer; None where it has none; raises GraftError for a damaged one."""
    texts = file.texts(f"{_KEYS}tokens")
    if texts is None:
        return None
    model = file.value(f"{_KEYS}model", str)
    pre = file.value(f"{_KEYS}pre", str, "default")
    types = file.numbers(f"{_KEYS}token_type") or [int(TokenType.NORMAL)] * len(texts)
    scores = file.numbers(f"{_KEYS}scores") or []
    for name, found in (("token_type", types), ("scores", scores)):
        if found and len(found) != len(texts):
            raise GraftError(
                f"{file.path}: {_KEYS}{name} has {len(found)} entries for {len(texts)} tokens"
            )
    pieces = model == "llama"
    return TokenList(
        model=model,
        pre=pre,
        texts=texts,
        types=types,
        scores=scores,
        merges=file.texts(f"{_KEYS}merges") or [],
        special_ids=_special_ids(file, len(texts), pieces),
        add_bos=file.value(f"{_KEYS}add_bos_token", bool, pieces or pre in _STARTS),
        add_eos=file.value(f"{_KEYS}add_eos_token", bool, False),
        add_space_prefix=file.value(f"{_KEYS}add_space_prefix", bool, pieces),
        chat_template=_chat_template(file),
    )


def _special_ids(file: GgufFile, tokens: int, pieces: bool) -> dict[str, int]:
    found: dict[str, Any] = {}
    for name, key in _SPECIAL.items():
        usual = _USUAL.get(name) if pieces else None
        found[name] = file.metadata.get(f"{_KEYS}{key}_token_id", usual)
    return {name: id_ for name, id_ in found.items() if type(id_) is int and 0 <= id_ < tokens}


def _chat_template(file: GgufFile) -> str | dict[str, str] | None:
    """Return the template, or several by name."""
    key = "tokenizer.chat_template"
    default = file.metadata.get(key)
    if default is not None and not isinstance(default, str):
        raise GraftError(f"{file.path}: metadata {key} is {quoted(default)}; expected a text")
    names = file.texts("tokenizer.chat_templates") or []
    named = {name: file.value(f"{key}.{name}", str) for name in names}
    if not named:
        return default
    return ({"default": default} if default is not None else {}) | named
