"""A Hugging Face BPE tokenizer as GGUF metadata, so that llama.cpp cuts text into the same ids."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gguf
from gguf import TokenType
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from graft.errors import GraftError, raise_problems
from graft.export.gguf.scores import scores_by_merge
from graft.export.gguf.tokenizer_kind import SPACE, TokenizerKind, recognise
from graft.text import listed
from graft.understood import tokenizing

_PHI3 = re.compile("phi-?3", re.IGNORECASE)
_PHI3_KEEPING = frozenset({"<unk>", "<s>", "<|endoftext|>"})
"""The tokens of Phi-3 behind which spaces stay."""
_BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True)
class GgufTokenizer:
    """A tokenizer in GGUF's terms: `merges` for byte-level BPE, `scores` for the other kind."""

    kind: TokenizerKind
    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]
    special_ids: Mapping[str, int]
    """Ids of bos, eos, unk and pad, as far as there are."""
    add_bos: bool
    add_eos: bool
    chat_template: str | dict[str, str] | None
    notes: tuple[str, ...]
    """What llama.cpp does differently with rare texts."""
    strips_as_phi3: bool = False
    """Its added tokens swallow the spaces behind them, but for three, as Phi-3's do."""

    def named(self, name: str) -> str:
        """Return the name for a file, whose tokens llama.cpp treats as Phi-3's if that is in it.

        Of a model without some of those tokens it does not load such a file.
        """
        name = name.encode("utf-8", "replace").decode()
        said = _PHI3.search(name) is not None
        if said is self.strips_as_phi3:
            return name
        return f"Phi-3 {name}" if self.strips_as_phi3 else _PHI3.sub("Phi_3", name)


def convert_tokenizer(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> GgufTokenizer:
    """Return the tokenizer in GGUF's terms, one token for each of the model's embeddings.

    Raises GraftError that says what was found when llama.cpp has no tokenizer that cuts alike.
    """
    if not tokenizer.is_fast:
        raise GraftError(
            f"tokenizer: {type(tokenizer).__name__} has no tokenizer.json; GGUF export reads that "
            "file: save the tokenizer as a fast one first"
        )
    backend = tokenizer.backend_tokenizer
    spec: dict[str, Any] = json.loads(backend.to_str())
    kind, problems = recognise(backend, spec)
    raise_problems(problems, "tokenizer")
    assert kind is not None
    added = {entry["id"]: entry for entry in spec["added_tokens"]}
    whole: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    vocabulary = {token: index for token, index in whole.items() if index < config.vocab_size}
    special_ids = _special_ids(tokenizer, config)
    beyond = sorted(whole.keys() - vocabulary.keys(), key=lambda token: whole[token])
    beyond_problems = _beyond_problems(tokenizer, beyond, whole, added, config.vocab_size)
    if special_ids.get("pad", 0) >= config.vocab_size:
        del special_ids["pad"]
    types = {
        index: _token_type(kind, token, added.get(index), index == special_ids.get("unk"))
        for token, index in vocabulary.items()
    }
    merges: list[list[str]] = spec["model"]["merges"]
    sentencepiece = kind.model == "llama"
    scores: dict[int, float] = {}
    if sentencepiece:
        # Those that were added are cut out of a text, unless they stand for spaces, as Gemma's.
        user = {t for t, i in vocabulary.items() if types[i] is TokenType.USER_DEFINED}
        ordinary = {
            t: i for t, i in vocabulary.items() if types[i] is TokenType.NORMAL or t in user
        }
        apart = {token for token in user if SPACE not in token}
        scores, problems = scores_by_merge(ordinary, merges, apart)
    add_bos, add_eos, affix_problems = _affixes(tokenizer, special_ids)
    missing = [token for token in _BYTE_TOKENS if token not in vocabulary]
    if sentencepiece and missing:
        problems.append(f"{len(missing)} byte tokens are missing ({missing[0]} ...)")
    raise_problems(problems + beyond_problems + affix_problems, "tokenizer")
    lowest = -float(len(merges))
    texts = {index: token for token, index in vocabulary.items()}
    strips_as_phi3 = _strips_as_phi3(spec["added_tokens"])
    kept = [entry for entry in spec["added_tokens"] if entry["id"] < config.vocab_size]
    ids = range(config.vocab_size)
    return GgufTokenizer(
        kind=kind,
        tokens=tuple(texts.get(index) or _unused(index, vocabulary) for index in ids),
        types=tuple(types.get(index, TokenType.UNUSED) for index in ids),
        merges=() if sentencepiece else tuple(" ".join(pair) for pair in merges),
        scores=tuple(scores.get(index, lowest) for index in ids) if sentencepiece else (),
        special_ids=special_ids,
        add_bos=add_bos,
        add_eos=add_eos,
        chat_template=tokenizer.chat_template,
        notes=(
            *kind.notes,
            *(() if strips_as_phi3 else _stripping_notes(kept)),
            *_beyond_notes(beyond, config.vocab_size),
            *_end_notes(special_ids),
        ),
        strips_as_phi3=strips_as_phi3,
    )


def _unused(index: int, vocabulary: Container[str]) -> str:
    """Return a name that no token has, for an embedding without one."""
    name = f"[PAD{index}]"
    while name in vocabulary:
        name = f"[{name}]"
    return name


def _beyond_problems(
    tokenizer: PreTrainedTokenizerBase,
    beyond: Sequence[str],
    vocabulary: Mapping[str, int],
    added: Container[int],
    embeddings: int,
) -> list[str]:
    """Return the tokens without an embedding that a text or a prompt may hold.

    One that was added and is never written, as many a padding token, can be left out.
    """
    template = str(tokenizer.chat_template or "")
    ends = (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token)
    used = [
        token
        for token in beyond
        if vocabulary[token] not in added or token in ends or token in template
    ]
    if not used:
        return []
    return [
        f"{len(used)} tokens ({used[0]!r} ...) lie beyond the model's {embeddings} embeddings, and "
        "texts or prompts hold them; use the tokenizer that belongs to the model, or enlarge the "
        "model with resize_token_embeddings"
    ]


def _beyond_notes(beyond: Sequence[str], embeddings: int) -> tuple[str, ...]:
    if not beyond:
        return ()
    return (
        f"added tokens {listed(map(repr, beyond), 4)} are left out, because they lie beyond "
        f"the model's {embeddings} embeddings",
    )


def _end_notes(special_ids: Container[str]) -> tuple[str, ...]:
    if "eos" in special_ids:
        return ()
    return (
        "neither tokenizer nor model names a token that ends a text; llama.cpp then takes one by "
        "its number, which may be any token of this tokenizer: name eos_token",
    )


def add_tokenizer_metadata(writer: gguf.GGUFWriter, tokenizer: GgufTokenizer) -> None:
    """Write the tokenizer's keys."""
    writer.add_tokenizer_model(tokenizer.kind.model)
    writer.add_tokenizer_pre(tokenizer.kind.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types([int(kind) for kind in tokenizer.types])
    if tokenizer.kind.model == "llama":
        writer.add_token_scores(tokenizer.scores)
        writer.add_add_space_prefix(tokenizer.kind.add_space_prefix)
    else:
        writer.add_token_merges(tokenizer.merges)
    for name, index in tokenizer.special_ids.items():
        writer.add_uint32(_SPECIAL_KEYS[name], index)
    writer.add_add_bos_token(tokenizer.add_bos)
    writer.add_add_eos_token(tokenizer.add_eos)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        writer.add_chat_template([{"name": n, "template": t} for n, t in template.items()])
    elif template:
        writer.add_chat_template(template)


_SPECIAL_KEYS = {
    "bos": gguf.Keys.Tokenizer.BOS_ID,
    "eos": gguf.Keys.Tokenizer.EOS_ID,
    "unk": gguf.Keys.Tokenizer.UNK_ID,
    "pad": gguf.Keys.Tokenizer.PAD_ID,
}


def _special_ids(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> dict[str, int]:
    eos = getattr(config, "eos_token_id", None)
    found = {
        "bos": _first(tokenizer.bos_token_id, getattr(config, "bos_token_id", None)),
        "eos": _first(tokenizer.eos_token_id, eos[0] if isinstance(eos, list) else eos),
        "unk": tokenizer.unk_token_id,
        "pad": _first(tokenizer.pad_token_id, getattr(config, "pad_token_id", None)),
    }
    return {name: index for name, index in found.items() if index is not None and index >= 0}


def _first(*ids: int | None) -> int | None:
    return next((index for index in ids if index is not None), None)


def _token_type(
    kind: TokenizerKind, token: str, added: dict[str, Any] | None, unknown: bool
) -> TokenType:
    if kind.model == "llama" and unknown:
        return TokenType.UNKNOWN
    if kind.model == "llama" and token in _BYTE_TOKENS:
        return TokenType.BYTE
    if added is None:
        return TokenType.NORMAL
    return TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED


def _affixes(
    tokenizer: PreTrainedTokenizerBase, special_ids: Mapping[str, int]
) -> tuple[bool, bool, list[str]]:
    """Return whether the tokenizer puts BOS before and EOS after a text."""
    with tokenizing():
        plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
        whole: list[int] = tokenizer("a", add_special_tokens=True)["input_ids"]
    starts = range(len(whole) - len(plain) + 1)
    start = next((i for i in starts if whole[i : i + len(plain)] == plain), 0)
    before, after = whole[:start], whole[start + len(plain) :]
    problems = []
    for ids, name in ((before, "bos"), (after, "eos")):
        if ids and ids != [special_ids.get(name)]:
            problems.append(
                f"it puts the ids {ids} {'before' if name == 'bos' else 'after'} a text; GGUF can "
                f"only say that {name.upper()} (id {special_ids.get(name)}) is put there: change "
                "the tokenizer's post-processor"
            )
    return bool(before), bool(after), problems


def _strips_as_phi3(added: Iterable[dict[str, Any]]) -> bool:
    """Return whether the tokens swallow spaces as llama.cpp has it for a model named Phi-3."""
    found = {entry["content"]: entry for entry in added}
    return {*_PHI3_KEEPING, "</s>"} <= found.keys() and all(
        entry["rstrip"] is (token not in _PHI3_KEEPING)
        and not (entry["lstrip"] or entry["single_word"])
        for token, entry in found.items()
    )


def _stripping_notes(added: Iterable[dict[str, Any]]) -> tuple[str, ...]:
    greedy = [
        entry["content"]
        for entry in added
        if entry["lstrip"] or entry["rstrip"] or entry["single_word"]
    ]
    if not greedy:
        return ()
    return (
        f"added tokens {', '.join(map(repr, greedy[:4]))} swallow the spaces around them or match "
        "whole words only (lstrip, rstrip, single_word); in llama.cpp they do not",
    )
