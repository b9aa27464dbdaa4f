"""Encoding: rendered rows become token ids with a mask of the trained tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from graft.data.chat import chat_opening
from graft.data.examples import Cutting, Example
from graft.data.render import render_opening, render_row
from graft.data.rows import RowProblems, Rows
from graft.data.shapes.base import Rendered, Tokenizer, text_problem
from graft.data.shapes.registry import SHAPES
from graft.data.templates import rendering
from graft.data.tokens import Encoder, check_fast
from graft.errors import GraftError
from graft.files.bounds import bound, raise_beyond
from graft.text import listed

ROW_CHARACTERS = 2**20
"""Characters that any row may have; each may take 500 bytes and 4 µs before the row is cut."""
DOCUMENT_CHARACTERS = 2**24
"""Characters that a row may have all of which is trained."""
TOKEN_CHARACTERS = 32
"""Characters that a row may have for each token that is left of it."""

_CHUNK = 1024
_CHUNK_CHARACTERS = 2**20


@dataclass(frozen=True)
class EncodedData:
    """Encoded rows of one kind, with the counts that a user should see before training."""

    examples: list[Example]
    kind: str
    ignored_keys: tuple[str, ...] = ()

    @cached_property
    def row_count(self) -> int:
        """Rows; a document that is longer than an example has several of these."""
        return sum(not example.window for example in self.examples)

    @cached_property
    def lost_tokens(self) -> int:
        """Tokens that cuts took away."""
        return sum(example.lost for example in self.examples)

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
        windows = ""
        if self.row_count < len(self.examples):
            windows = f" in {len(self.examples):,} windows"
        lost = ""
        if self.lost_tokens:
            share = self.lost_tokens / (self.total_tokens + self.lost_tokens)
            lost = f" ({self.lost_tokens:,} tokens lost, {share:.1%} of all)"
        line = (
            f"{self.row_count:,} {self.kind} rows{windows}, {self.total_tokens:,} tokens, "
            f"{self.target_tokens:,} of them trained; {self.cut_rows:,} rows cut{lost}; "
            f"end of sequence trained in {self.eos_rows:,} rows"
        )
        if self.ignored_keys:
            line += f"; keys not used: {listed(self.ignored_keys)}"
        return line


def encode_rows(
    rows: Rows,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    eos: bool,
    separator: str,
    stride: int | None = None,
) -> EncodedData:
    """Encode every row to at most max_length tokens, documents to as many windows as they need.

    What lies in a span is trained. Raises GraftError that lists every row that cannot be rendered
    or has no target left.
    """
    check_tokenizer(tokenizer, eos)
    encoder = Encoder(tokenizer)
    cutting = Cutting(max_length, tokenizer.eos_token_id, eos, stride)
    is_document = SHAPES[rows.kind].is_document
    problems = RowProblems("rows that cannot be trained on")
    examples: list[Example] = []
    with rendering():
        for chunk in _chunks(rows, tokenizer, max_length, separator, problems):
            encoded = encoder.encode([found for _, found in chunk])
            for (where, found), tokens in zip(chunk, encoded, strict=True):
                for example in cutting.examples(where, found, tokens, is_document):
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
            _check_length(found.text, max_length, SHAPES[rows.kind].is_document)
        except GraftError as error:
            problems.add(f"{row.where}: {error}")
            continue
        chunk.append((row.where, found))
        characters += len(found.text)
        if len(chunk) == _CHUNK or characters > _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    yield chunk


def _check_length(text: str, max_length: int, is_document: bool) -> None:
    most = max(bound(ROW_CHARACTERS), bound(TOKEN_CHARACTERS) * max_length)
    if is_document:
        most = max(most, bound(DOCUMENT_CHARACTERS))
    if len(text) > most:
        cut = f"{most:,}, of which {max_length:,} tokens are left,"
        raise_beyond("its text", f"{len(text):,} characters", cut)


def encode_prompt(
    kind: str, fields: str | Mapping[str, Any], tokenizer: Tokenizer, separator: str
) -> list[int]:
    """Return the token ids that generation starts from, which training has before an answer."""
    return _opened(render_opening(kind, fields, tokenizer, separator), tokenizer)


def encode_chat(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[int]:
    """Return the token ids that an answer to messages starts from, whatever a model's rows were."""
    return _opened(chat_opening({"messages": messages}, tokenizer), tokenizer)


def _opened(opening: Rendered, tokenizer: Tokenizer) -> list[int]:
    if problem := text_problem(opening.text):
        raise GraftError(f"the prompt {problem}")
    return Encoder(tokenizer).encode([opening])[0].ids


def mask_preview(example: Example, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """Return (token as the vocabulary spells it, whether it is trained) for every token."""
    tokens: list[str] = tokenizer.convert_ids_to_tokens(example.input_ids)
    return list(zip(tokens, example.targets, strict=True))


def check_tokenizer(tokenizer: Tokenizer, eos: bool) -> None:
    """Raise GraftError for a slow tokenizer, and for one without an EOS token that is asked for."""
    check_fast(tokenizer)
    if eos and tokenizer.eos_token_id is None:
        raise GraftError(
            "the tokenizer names no end-of-sequence token, so the model could not learn to "
            "stop; set eos_token in tokenizer_config.json, or pass --no-eos"
        )


def _why_no_target(example: Example, max_length: int) -> str:
    if not example.cut:
        return f"{len(example.input_ids)} token(s), none of which is trained; remove the row"
    return (
        f"no trained token is left after the cut to {max_length} tokens; "
        "raise --max-length, or shorten or remove the row"
    )
