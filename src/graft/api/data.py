"""A look at data before training: what a model would be trained on, token by token."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from graft.api.run.folder import is_run, read_run_config
from graft.data.config import DataConfig
from graft.data.conversations.named import choose_template
from graft.data.encode import EncodedData
from graft.data.examples import Example, sequences_of, side_names
from graft.data.joint import joint_notes
from graft.data.load import load_train_and_eval, resolve_max_length
from graft.data.near import near_rows
from graft.data.overlap import Overlap
from graft.data.storage.facts import Facts
from graft.data.storage.store import places_of
from graft.errors import GraftError
from graft.model.folder import CONFIG_FILE, find_text_folder, read_config, read_tokenizer
from graft.model.pieces import Piece, pieces_of
from graft.model.subject import Subject
from graft.model.text_part import check_text_only
from graft.model.tokens import check_tokens
from graft.objectives.registry import DEFAULT_OBJECTIVE, OBJECTIVES
from graft.text import listed
from graft.train.gates import data_notes

BARS = 20
"""Bars of a histogram, about."""


@dataclass(frozen=True)
class Part:
    """What training or evaluation sees of the data, in numbers."""

    rows: int
    examples: int
    """Rows, or windows of rows that are longer than a window."""
    tokens: int
    trained_tokens: int
    cut_rows: int
    lost_tokens: int
    """Tokens that cuts took away."""
    eos_rows: int
    """Examples in which an end-of-sequence token is trained."""
    shortest: int
    median: int
    longest: int
    """Tokens of an example."""


@dataclass(frozen=True)
class Histogram:
    """How many examples have how many tokens: counts[i] have bars[i] up to bars[i + 1] - 1."""

    bars: list[int]
    counts: list[int]


@dataclass(frozen=True)
class ShownRow:
    """A row as its tokens."""

    where: str
    held_out: bool
    pieces: list[Piece]
    cut: bool
    lost: int
    window: int


@dataclass(frozen=True)
class Twin:
    """A held-out row that a training row nearly is."""

    held_out: str
    """Where it stands."""
    training: str
    share: float
    """Of the runs of tokens that are its own, how much the training row has."""


@dataclass(frozen=True)
class DataReport:
    """What there is to know of data for a model before it is trained on."""

    model: str
    data: str
    kind: str
    max_length: int
    training: Part
    held_out: Part
    lengths: Histogram
    """Of the training examples."""
    overlap: Overlap
    twins: list[Twin]
    """Beside those of `overlap`."""
    notes: list[str]
    """What training would say of the data."""
    rows: list[ShownRow]

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return asdict(self)


def look_at_data(
    model: str,
    config: DataConfig,
    *,
    seed: int = 0,
    rows: int = 3,
    row: int | None = None,
    objective: str = DEFAULT_OBJECTIVE,
    trust_remote_code: bool = False,
) -> DataReport:
    """Return what a model would be trained on; nothing is trained, and no weight is read.

    model: a model folder, one with a tokenizer alone, or a hub id, of which no weights are fetched.
    rows: how many training rows are shown token by token; row: which one is instead, by the number
    behind its file's name in every message. objective: what is to be learnt from them, on which it
    depends how they are read. Raises GraftError with every problem that training would raise for
    the data.
    """
    if rows < 0:
        raise GraftError(f"--rows is {rows}; expected 0 or more")
    if is_run(Path(model)):
        base = read_run_config(Path(model)).model
        raise GraftError(
            f"{model} is the folder of a run; give the model that it trained: graft data {base}"
        )
    folder = find_text_folder(model)
    subject = None
    if (folder / CONFIG_FILE).is_file():
        settings = read_config(folder, trust_remote_code)
        check_text_only(settings, folder)
        subject = Subject(folder, settings, trust_remote_code, config_alone=True)
    tokenizer = subject.tokenizer if subject else read_tokenizer(folder, trust_remote_code)
    choose_template(tokenizer, config.chat_template)
    limit = None if subject is None else subject.position_limit
    holds = OBJECTIVES[objective].holds
    training, held_out = load_train_and_eval(config, tokenizer, limit, seed, holds=holds)
    if subject is not None:
        check_tokens(subject.skeleton, tokenizer, training.examples, held_out.examples)
    assert training.overlap is not None, "loading counts it"
    twins = _twins(training, held_out)
    chosen = _chosen(training, held_out, rows, row)
    return DataReport(
        model=model,
        data=config.data,
        kind=training.kind,
        max_length=resolve_max_length(config, limit),
        training=_part(training),
        held_out=_part(held_out),
        lengths=histogram(training.facts),
        overlap=training.overlap,
        twins=twins,
        notes=[
            *joint_notes(config, tokenizer, holds),
            *_notes(training, held_out, config.eos),
            *_near_note(twins, held_out.row_count),
        ],
        rows=[
            side for one, is_held_out in chosen for side in shown_sides(one, tokenizer, is_held_out)
        ],
    )


def _notes(training: EncodedData, held_out: EncodedData, eos: bool) -> list[str]:
    """Return all that training says of the data beside its counts."""
    found = [*data_notes(training, held_out, eos), *training.remark_lines()]
    found += [f"held out: {line}" for line in held_out.remark_lines()]
    if training.dropped_rows:
        found.append(f"{training.dropped_rows:,} training rows that were there twice are dropped")
    if training.ignored_keys:
        found.append(f"keys that are not used: {listed(training.ignored_keys)}")
    return found


def _twins(training: EncodedData, held_out: EncodedData) -> list[Twin]:
    """Return the held-out rows that are nearly trained, without those that are trained."""
    trained = np.isin(held_out.facts.row_keys, training.facts.row_keys)
    rows, tested = training.examples, held_out.examples
    return [
        Twin(tested[one.held_out].where, rows[one.training].where, one.share)
        for one in near_rows(rows, tested)
        if not trained[one.held_out]
    ]


def _near_note(twins: list[Twin], held_out: int) -> list[str]:
    if not twins:
        return []
    pairs = [
        (one.held_out.rpartition("/")[2], one.training.rpartition("/")[2], one.share)
        for one in twins[:3]
    ]
    some = "; ".join(f"{share:.0%} of {tested} is in {row}" for tested, row, share in pairs)
    return [f"{len(twins):,} of {held_out:,} held-out rows are nearly a training row: {some}"]


def shown_row(
    example: Example, tokenizer: PreTrainedTokenizerBase, held_out: bool = False
) -> ShownRow:
    """Return an example as it is shown."""
    pieces = pieces_of(example, tokenizer)
    return ShownRow(example.where, held_out, pieces, example.cut, example.lost, example.window)


def shown_sides(
    example: Example, tokenizer: PreTrainedTokenizerBase, held_out: bool = False
) -> list[ShownRow]:
    """Return an example as it is shown: the sides of a pair one after the other, each named."""
    found = []
    for side, name in zip(sequences_of(example), side_names(example), strict=True):
        shown = shown_row(side, tokenizer, held_out)
        found.append(replace(shown, where=f"{shown.where}, {name}") if name else shown)
    return found


def histogram(facts: Facts) -> Histogram:
    """Return how many examples have how many tokens, in bars of equal and round width."""
    longest = int(facts.lengths.max(initial=1))
    width = _round(longest / BARS)
    bars = list(range(0, longest + width + 1, width))
    counts, _ = np.histogram(facts.lengths, bars)
    return Histogram(bars, counts.tolist())


def _round(least: float) -> int:
    """Return the smallest of 1, 2, 4, 5 times a power of ten that is at least `least`."""
    power = 1
    while True:
        for factor in (1, 2, 4, 5):
            if factor * power >= least:
                return factor * power
        power *= 10


def _part(data: EncodedData) -> Part:
    facts = data.facts
    return Part(
        rows=data.row_count,
        examples=len(data.examples),
        tokens=data.total_tokens,
        trained_tokens=data.target_tokens,
        cut_rows=data.cut_rows,
        lost_tokens=data.lost_tokens,
        eos_rows=data.eos_rows,
        shortest=int(facts.lengths.min()),
        median=int(np.median(facts.lengths)),
        longest=int(facts.lengths.max()),
    )


def _chosen(
    training: EncodedData, held_out: EncodedData, rows: int, row: int | None
) -> list[tuple[Example, bool]]:
    """Return the examples to show, each with whether it is held out."""
    if row is None:
        return [(one, False) for one in training.examples[:rows]]
    found = [
        (data.examples[number], is_held_out)
        for data, is_held_out in ((training, False), (held_out, True))
        for number, place in enumerate(places_of(data.examples))
        if place.rpartition(":")[2].removeprefix("row ") == str(row)
    ]
    if not found:
        last = training.examples[-1].where
        raise GraftError(f"--row {row}: no row has that number; the last training row is {last}")
    return found
