"""Encoding: rendered rows become token ids with a mask of the trained tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from graft.data.chat import chat_opening
from graft.data.conversations.named import check_chosen
from graft.data.examples import Cutting, Example
from graft.data.overlap import Overlap
from graft.data.render import render_opening, render_row
from graft.data.rows import Row, RowProblems, Rows
from graft.data.shapes.base import Rendered, Tokenizer, text_problem
from graft.data.shapes.registry import SHAPES
from graft.data.skipped import Skipped
from graft.data.storage.facts import Facts
from graft.data.storage.store import facts_of
from graft.data.templates import rendering
from graft.data.tokens import Encoder, check_fast
from graft.errors import GraftError
from graft.files.bounds import bound, raise_beyond
from graft.text import listed

ROW_CHARACTERS = 2**22
"""Characters that any row may have; each may take 500 bytes and 1 µs before the row is cut."""
DOCUMENT_CHARACTERS = 2**24
"""Characters that a row may have all of which is trained."""
TOKEN_CHARACTERS = 32
"""Characters that a row may have for each token that is left of it."""

_CHUNK = 1024
_CHUNK_CHARACTERS = 2**20


@dataclass(frozen=True)
class EncodedData:
    """Encoded rows of one kind, with the counts that a user should see before training."""

    examples: Sequence[Example]
    kind: str
    ignored_keys: tuple[str, ...] = ()
    dropped_rows: int = 0
    """Rows that were there twice, and were left out."""
    overlap: Overlap | None = None
    """Rows that are there twice, in training data; weights of a mixture are no repetition."""
    remarks: Mapping[str, int] = field(default_factory=dict)
    """What the user should know of rows (`Rendered.remarks`), and in how many of them."""
    notes: tuple[str, ...] = ()
    """What a user should know of how the rows were read."""
    skipped: Skipped | None = None
    """Bad rows that were passed over; None where they are refused."""

    @cached_property
    def facts(self) -> Facts:
        """What is asked of all examples at once."""
        return facts_of(self.examples)

    @cached_property
    def row_count(self) -> int:
        """Rows; a document that is longer than an example has several of these."""
        return int((self.facts.windows == 0).sum())

    @cached_property
    def lost_tokens(self) -> int:
        """Tokens that cuts took away."""
        return int(self.facts.lost.sum(dtype=np.int64))

    @cached_property
    def cut_rows(self) -> int:
        """Rows that were longer than the most allowed tokens."""
        return int(self.facts.cut.sum())

    @cached_property
    def eos_rows(self) -> int:
        """Rows in which an end-of-sequence token is trained."""
        return int(self.facts.trains_eos.sum())

    @cached_property
    def target_tokens(self) -> int:
        """Tokens that are trained."""
        return int(self.facts.targets.sum(dtype=np.int64))

    @cached_property
    def total_tokens(self) -> int:
        """Tokens of all rows, after cutting."""
        return int(self.facts.lengths.sum(dtype=np.int64))

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return int(self.facts.lengths.max())

    @property
    def trained_share(self) -> float:
        """Share of the tokens that is trained."""
        return self.target_tokens / self.total_tokens

    def summary(self) -> str:
        """Return a line: rows, tokens, trained tokens, cut rows, trained ends, unread keys.

        A line for each remark follows.
        """
        windows = ""
        if self.row_count < len(self.examples):
            windows = f" in {len(self.examples):,} windows"
        lost = ""
        if self.lost_tokens:
            share = self.lost_tokens / (self.total_tokens + self.lost_tokens)
            lost = f" ({self.lost_tokens:,} tokens lost, {share:.1%} of all)"
        line = (
            f"{self.row_count:,} {self.kind} rows{windows}, {self.total_tokens:,} tokens, "
            f"{self.target_tokens:,} of them trained ({self.trained_share:.0%}); "
            f"{self.cut_rows:,} rows cut{lost}; "
            f"end of sequence trained in {self.eos_rows:,} rows"
        )
        if self.dropped_rows:
            line += f"; {self.dropped_rows:,} rows that were there twice dropped"
        if self.ignored_keys:
            line += f"; keys not used: {listed(self.ignored_keys)}"
        return "\n  ".join([line, *self.remark_lines()])

    def remark_lines(self) -> list[str]:
        """Return a line for each remark, those of most rows first."""
        remarks = sorted(self.remarks.items(), key=lambda remark: -remark[1])
        return [f"in {count:,} row{'s' * (count != 1)} {clause}" for clause, count in remarks]


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
    encoding = Encoding(max_length, eos, separator, stride)
    encoder = RowEncoder(rows.kind, tokenizer, encoding)
    found = encoder.encode(rows.rows, bad_rows(rows.skipped))
    return EncodedData(
        found,
        rows.kind,
        rows.ignored_keys,
        remarks=encoder.remarks,
        notes=rows.notes,
        skipped=rows.skipped,
    )


def bad_rows(skipped: Skipped | None = None) -> RowProblems:
    """Return where the problems of rows are collected that cannot be encoded."""
    heading = "rows that cannot be trained on (--skip-bad-rows of graft train leaves them out)"
    return RowProblems(heading, skipped)


@dataclass(frozen=True)
class Encoding:
    """How rows become examples; see `DataConfig`."""

    max_length: int
    eos: bool
    separator: str
    stride: int | None = None


class RowEncoder:
    """Encodes rows of one kind, lot by lot; what it makes of a row follows from that row alone."""

    def __init__(self, kind: str, tokenizer: Tokenizer, encoding: Encoding) -> None:
        """Look at the tokenizer; raises GraftError when it cannot be used."""
        self.kind = kind
        self.remarks: Counter[str] = Counter()
        """What is known of the rows that were encoded, and of how many; see `Rendered`."""
        self._tokenizer = tokenizer
        self._encoding = encoding
        self._encoder = Encoder(tokenizer)
        self._cutting = Cutting(
            encoding.max_length, tokenizer.eos_token_id, encoding.eos, encoding.stride
        )
        self._is_document = SHAPES[kind].is_document
        self._most = max(bound(ROW_CHARACTERS), bound(TOKEN_CHARACTERS) * encoding.max_length)
        if self._is_document:
            self._most = max(self._most, bound(DOCUMENT_CHARACTERS))
        if SHAPES[kind].is_conversation:
            check_chosen(tokenizer)

    def encode(self, rows: Iterable[Row], problems: RowProblems) -> list[Example]:
        """Return the examples of rows; raises GraftError for all problems, those there are too."""
        with rendering():
            examples = self.examples(rows, problems.add)
        problems.raise_all()
        return examples

    def examples(self, rows: Iterable[Row], problem: Callable[[str], None]) -> list[Example]:
        """Return the examples of rows; `problem` takes what is wrong with one."""
        examples: list[Example] = []
        for chunk in self._chunks(rows, problem):
            self.remarks.update(remark for _, found in chunk for remark in found.remarks)
            encoded = self._encoder.encode(
                [text for _, found in chunk for text in (found, *found.others)]
            )
            taken = iter(encoded)
            for where, found in chunk:
                tokens = next(taken)
                if found.others:
                    sides = [tokens, *islice(taken, len(found.others))]
                    try:
                        examples.append(self._cutting.sides(where, found, sides))
                    except GraftError as error:
                        problem(f"{where}: {error}")
                    continue
                for example in self._cutting.examples(where, found, tokens, self._is_document):
                    if any(example.targets):
                        examples.append(example)
                    else:
                        problem(f"{where}: {self._cutting.why_no_target(example)}")
        return examples

    def _chunks(
        self, rows: Iterable[Row], problem: Callable[[str], None]
    ) -> Iterator[list[tuple[str, Rendered]]]:
        """Yield rendered rows, and where they stand, in lots that a tokenizer takes at once."""
        chunk: list[tuple[str, Rendered]] = []
        characters = 0
        for row in rows:
            try:
                found = render_row(self.kind, row, self._tokenizer, self._encoding.separator)
                for text in (found, *found.others):
                    self._check_length(text.text)
            except GraftError as error:
                problem(f"{row.where}: {error}")
                continue
            chunk.append((row.where, found))
            characters += sum(len(text.text) for text in (found, *found.others))
            if len(chunk) == _CHUNK or characters > _CHUNK_CHARACTERS:
                yield chunk
                chunk, characters = [], 0
        yield chunk

    def _check_length(self, text: str) -> None:
        if len(text) > self._most:
            cut = f"{self._most:,}, of which {self._encoding.max_length:,} tokens are left,"
            raise_beyond("its text", f"{len(text):,} characters", cut)


def encode_prompt(
    kind: str, fields: str | Mapping[str, Any], tokenizer: Tokenizer, separator: str
) -> list[int]:
    """Return the token ids that generation starts from, which training has before an answer."""
    return _opened(render_opening(kind, fields, tokenizer, separator), tokenizer)


def encode_chat(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[int]:
    """Return the token ids that an answer to messages starts from, whatever a model's rows were."""
    return _opened(chat_opening(messages, tokenizer), tokenizer)


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
