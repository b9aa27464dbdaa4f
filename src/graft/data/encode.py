"""Encoding: rendered rows become token ids with a mask of the trained tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from graft.data.chat import chat_prompt
from graft.data.render import render_prompt, render_row
from graft.data.rows import RowProblems, Rows
from graft.data.shapes.base import Rendered, Tokenizer, text_problem
from graft.data.templates import rendering
from graft.errors import GraftError
from graft.files.bounds import bound, raise_beyond
from graft.text import listed
from graft.understood import tokenizing

ROW_CHARACTERS = 2**20
"""Characters that any row may have; each may take 500 bytes and 4 µs before the row is cut."""
TOKEN_CHARACTERS = 32
"""Characters that a row may have for each token that is left of it."""

_CHUNK = 1024
_CHUNK_CHARACTERS = 2**20


@dataclass(frozen=True)
class Example:
    """A row as tokens; targets[i] says that token i is predicted and scored, never token 0."""

    input_ids: list[int]
    targets: list[bool]
    where: str
    cut: bool = False
    trains_eos: bool = False
    values: Mapping[str, Any] = field(default_factory=dict)
    """What the objective reads of the row besides its tokens; see `Rendered.values`."""


@dataclass(frozen=True)
class EncodedData:
    """Encoded rows of one kind, with the counts that a user should see before training."""

    examples: list[Example]
    kind: str
    ignored_keys: tuple[str, ...] = ()

    @cached_property
    def cut_rows(self) -> int:
        """Rows that were longer than the most allowed tokens."""
        return sum(example.cut for example in self.examples)

    @cached_property
    def eos_rows(self) -> int:
        """Rows in which an end-of-sequence token is trained."""
        return sum(example.trains_eos for example in self.examples)

    @cached_property
    def target_tokens(self) -> int:
        """Tokens that are trained."""
        return sum(sum(example.targets) for example in self.examples)

    @cached_property
    def total_tokens(self) -> int:
        """Tokens of all rows, after cutting."""
        return sum(len(example.input_ids) for example in self.examples)

    def summary(self) -> str:
        """Return one line: rows, tokens, trained tokens, cut rows, trained ends, unread keys."""
        line = (
            f"{len(self.examples):,} {self.kind} rows, {self.total_tokens:,} tokens, "
            f"{self.target_tokens:,} of them trained; {self.cut_rows:,} rows cut; "
            f"end of sequence trained in {self.eos_rows:,} rows"
        )
        if self.ignored_keys:
            line += f"; keys not used: {listed(self.ignored_keys)}"
        return line


def encode_rows(
    rows: Rows, tokenizer: Tokenizer, *, max_length: int, eos: bool, separator: str
) -> EncodedData:
    """Encode every row to at most max_length tokens; a token that overlaps a span is a target.

    Raises GraftError that lists every row that cannot be rendered or has no target left.
    """
    check_tokenizer(tokenizer, eos)
    problems = RowProblems("rows that cannot be trained on")
    examples: list[Example] = []
    with rendering():
        for chunk in _chunks(rows, tokenizer, max_length, separator, problems):
            encoded = _tokenize([found.text for _, found in chunk], tokenizer)
            for (where, found), tokens in zip(chunk, encoded, strict=True):
                example = _example(where, found, tokens, max_length, eos, tokenizer.eos_token_id)
                examples.append(example)
                if not any(example.targets):
                    problems.add(f"{where}: {_why_no_target(example, max_length)}")
    problems.raise_all()
    return EncodedData(examples, rows.kind, rows.ignored_keys)


def _chunks(
    rows: Rows, tokenizer: Tokenizer, max_length: int, separator: str, problems: RowProblems
) -> Iterator[list[tuple[str, Rendered]]]:
    """Yield rendered rows, and where they stand, in lots that a tokenizer takes at once."""
    chunk: list[tuple[str, Rendered]] = []
    characters = 0
    for row in rows.rows:
        try:
            found = render_row(rows.kind, row, tokenizer, separator)
            _check_length(found.text, max_length)
        except GraftError as error:
            problems.add(f"{row.where}: {error}")
            continue
        chunk.append((row.where, found))
        characters += len(found.text)
        if len(chunk) == _CHUNK or characters > _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    yield chunk


def _check_length(text: str, max_length: int) -> None:
    most = max(bound(ROW_CHARACTERS), bound(TOKEN_CHARACTERS) * max_length)
    if len(text) > most:
        cut = f"{most:,}, of which {max_length:,} tokens are left,"
        raise_beyond("its text", f"{len(text):,} characters", cut)


def encode_prompt(
    kind: str, fields: str | Mapping[str, Any], tokenizer: Tokenizer, separator: str
) -> list[int]:
    """Return the token ids that generation starts from: render_prompt with training's BOS."""
    check_tokenizer(tokenizer, eos=False)
    text = render_prompt(kind, fields, tokenizer, separator)
    if problem := text_problem(text):
        raise GraftError(f"the prompt {problem}")
    return _tokenize([text], tokenizer)[0].ids


def encode_chat(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[int]:
    """Return the token ids that an answer to messages starts from, whatever a model's rows were."""
    check_tokenizer(tokenizer, eos=False)
    return _tokenize([chat_prompt(messages, tokenizer)], tokenizer)[0].ids


def mask_preview(example: Example, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """Return (token as the vocabulary spells it, whether it is trained) for every token."""
    tokens: list[str] = tokenizer.convert_ids_to_tokens(example.input_ids)
    return list(zip(tokens, example.targets, strict=True))


def check_tokenizer(tokenizer: Tokenizer, eos: bool) -> None:
    """Raise GraftError when the tokenizer has no offsets, or no EOS token though one is asked."""
    if not tokenizer.is_fast:
        raise GraftError(
            "the tokenizer is a slow one, which does not tell where in the text a token "
            "stands; convert it to a fast one (a folder with tokenizer.json)"
        )
    if eos and tokenizer.eos_token_id is None:
        raise GraftError(
            "the tokenizer names no end-of-sequence token, so the model could not learn to "
            "stop; set eos_token in tokenizer_config.json, or pass --no-eos"
        )


@dataclass(frozen=True)
class _Tokens:
    """Token ids and the [start, end) characters that each covers; (0, 0) for an added token."""

    ids: list[int]
    extents: list[tuple[int, int]]


def _tokenize(texts: list[str], tokenizer: Tokenizer) -> list[_Tokens]:
    """Encode with the tokenizer's own BOS, once, and without an EOS of its own."""
    if not texts:
        return []
    with tokenizing():
        encoded = tokenizer(
            texts,
            add_special_tokens=True,
            padding=False,
            truncation=False,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_attention_mask=False,
            verbose=False,
        )
    columns = (encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"])
    return [
        _without_doubles(text, tokenizer.bos_token, ids, offsets, added)
        for text, ids, offsets, added in zip(texts, *columns, strict=True)
    ]


def _without_doubles(
    text: str,
    bos: str | None,
    ids: list[int],
    offsets: Sequence[tuple[int, int]],
    added: list[int],
) -> _Tokens:
    """Drop added tokens after the text, and those before a text that brings its own BOS."""
    of_text = [index for index, flag in enumerate(added) if not flag]
    begin = of_text[0] if of_text and bos and text.startswith(bos) else 0
    end = of_text[-1] + 1 if of_text else len(ids)
    extents: list[tuple[int, int]] = []
    reached = 0
    for index in range(begin, end):
        if added[index]:
            extents.append((0, 0))
            continue
        # Some tokenizers trim white space from the offsets, down to nothing. A token covers all
        # that the ones before it left over, at least a character, or the newlines and spaces of
        # an answer would not be trained.
        start, stop = offsets[index]
        if start == stop == reached:
            stop += 1
        extents.append((min(start, reached), stop))
        reached = max(reached, stop)
    return _Tokens(ids[begin:end], extents)


def _example(
    where: str, rendered: Rendered, tokens: _Tokens, max_length: int, eos: bool, eos_id: int | None
) -> Example:
    ids = tokens.ids[: max_length + 1]
    targets = [
        any(start < last and stop > first for first, last in rendered.spans)
        for start, stop in tokens.extents[: max_length + 1]
    ]
    # The text may bring its own EOS, as chat templates do; then a second would be wrong.
    if eos and eos_id is not None and tokens.ids[-1:] != [eos_id]:
        ids.append(eos_id)
        targets.append(True)
    cut = len(ids) > max_length
    del ids[max_length:], targets[max_length:]
    targets[:1] = [False] * len(targets[:1])
    trains_eos = any(target and token == eos_id for token, target in zip(ids, targets, strict=True))
    return Example(ids, targets, where, cut, trains_eos, rendered.values)


def _why_no_target(example: Example, max_length: int) -> str:
    if not example.cut:
        return f"{len(example.input_ids)} token(s), none of which is trained; remove the row"
    return (
        f"no trained token is left after the cut to {max_length} tokens; "
        "raise --max-length, or shorten or remove the row"
    )
