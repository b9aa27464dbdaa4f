"""Rows that are there twice: counted, told, and dropped where that is asked for."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from graft.data.config import DataConfig
from graft.data.encode import EncodedData
from graft.data.load import load_train_and_eval
from graft.data.overlap import Overlap, overlap, without_duplicates
from graft.data.shapes.base import Rendered
from graft.data.storage.facts import Facts
from graft.data.storage.keys import Keys, keys_of
from graft.data.storage.store import Stored, facts_of, packed, write_batches
from graft.errors import GraftError
from graft.train.gates import overlap_note, share_note


def written(path: Path, *rows: tuple[str, str]) -> str:
    lines = (json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def loaded(tmp_path: Path, tokenizer, training, held_out, **options) -> tuple[EncodedData, Overlap]:
    config = DataConfig(
        data=written(tmp_path / "train.jsonl", *training),
        eval_data=written(tmp_path / "test.jsonl", *held_out),
        **options,
    )
    train, test = load_train_and_eval(config, tokenizer, None, seed=0)
    return train, overlap(facts_of(train.examples), facts_of(test.examples))


TRAINING = [("a", "x y"), ("b", "y"), ("A ", "X  Y"), ("a", "x y"), ("c", "z")]
HELD_OUT = [("a", "x\ty"), ("B", "other"), ("new", "row"), ("C", "z"), ("c", "z")]


def test_rows_are_the_same_but_for_white_space_and_case(tmp_path: Path, tokenizer) -> None:
    train, found = loaded(tmp_path, tokenizer, TRAINING, HELD_OUT)
    assert found == Overlap(repeated=2, held_out_trained=3, prompts_trained=4)
    note = overlap_note(found, train.row_count, len(HELD_OUT))
    assert note is not None and "3 of 5 held-out rows are trained too" in note
    assert "2 of 5 training rows repeat" in note and "--deduplicate" in note
    assert overlap_note(Overlap(0, 0, 5), 5, 5) is None


def test_deduplicate_trains_each_text_once_and_none_that_is_held_out(
    tmp_path: Path, tokenizer
) -> None:
    train, found = loaded(tmp_path, tokenizer, TRAINING, HELD_OUT, deduplicate=True)
    assert [example.where.rpartition(":")[2] for example in train.examples] == ["2"]
    assert found == Overlap(repeated=0, held_out_trained=0, prompts_trained=1)
    assert train.dropped_rows == 4 and "4 rows that were there twice dropped" in train.summary()
    with pytest.raises(GraftError, match="--deduplicate leaves no row"):
        loaded(tmp_path, tokenizer, [("a", "b")], [("A", "B")], deduplicate=True)


def test_a_share_that_is_held_out_of_repeated_rows_overlaps(tmp_path: Path, tokenizer) -> None:
    rows = [(f"question {number % 50}", "answer") for number in range(100)]
    config = DataConfig(data=written(tmp_path / "rows.jsonl", *rows), eval_fraction=0.2)
    train, test = load_train_and_eval(config, tokenizer, None, seed=0)
    found = overlap(facts_of(train.examples), facts_of(test.examples))
    assert found.held_out_trained > 10


def test_a_document_is_dropped_with_all_its_windows(tmp_path: Path, tokenizer) -> None:
    path = tmp_path / "texts.jsonl"
    texts = ["first " * 30, "second " * 20, "First\n" * 30, "third"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = DataConfig(data=str(path), eval_data=str(path), max_length=50)
    train, _ = load_train_and_eval(config, tokenizer, None, seed=0)
    facts = facts_of(train.examples)
    none = facts.of(np.zeros(0, np.int64))
    assert overlap(facts, none).repeated == 1
    kept = [train.examples[number] for number in without_duplicates(facts, none)]
    assert {example.where.rpartition(":")[2] for example in kept} == {"1", "2", "4"}
    assert sum(example.window == 0 for example in kept) == 3 < len(kept)
    with_tail = facts.of(np.arange(2, len(facts.lengths)))  # the beginning is held out
    assert 0 in without_duplicates(with_tail, none)


def test_keys_are_those_of_texts_and_prompts() -> None:
    row = Rendered("Say it:\n  Hello", ((10, 15),))
    same = Rendered("say  it: hello", ((9, 14),))
    assert keys_of(row) == keys_of(same)
    assert keys_of(row).row != keys_of(row).prompt
    assert keys_of(Rendered("text", ((0, 4),))).prompt == 0
    assert keys_of(Rendered("sayit: hello", ((7, 12),))).row != keys_of(row).row


def test_rows_of_which_nothing_is_known_are_no_duplicates() -> None:
    facts = _facts([0, 0, 7])
    assert overlap(facts, facts) == Overlap(0, 1, 0)
    assert list(without_duplicates(facts, _facts([]))) == [0, 1, 2]


def test_keys_are_stored_with_the_examples(tmp_path: Path, tokenizer) -> None:
    train, _ = loaded(tmp_path, tokenizer, TRAINING, HELD_OUT)
    file = tmp_path / "examples.arrow"
    write_batches(file, [packed(train.examples, "train.jsonl")])
    with file.open("rb") as stream:
        stored = Stored(stream, "train.jsonl")
    assert [one.keys for one in stored] == [one.keys for one in train.examples] != [Keys()] * 5
    assert isinstance(stream, io.BufferedReader)
    assert list(stored.facts.row_keys) == [one.keys.row for one in train.examples]


def test_two_hundred_thousand_rows_are_compared_in_a_moment() -> None:
    training = _facts(np.arange(200_000, dtype=np.uint64) % 190_000 + 1)
    held_out = _facts(np.arange(0, 1_000_000, 1000, dtype=np.uint64))
    begin = time.process_time()
    found = overlap(training, held_out)
    kept = without_duplicates(training, held_out)
    assert time.process_time() - begin < 1.0
    assert (found.repeated, found.held_out_trained) == (10_000, 190)
    assert len(kept) == 190_000 - 190


def test_a_mask_of_hardly_anything_is_told(tmp_path: Path, tokenizer) -> None:
    train, _ = loaded(tmp_path, tokenizer, [("a" * 500, "b")], [("c", "d")])
    told = share_note(train)
    assert told is not None and "only 0.4% of the tokens are trained" in told
    assert "(0%)" in train.summary()
    assert share_note(loaded(tmp_path, tokenizer, TRAINING, HELD_OUT)[0]) is None


def _facts(keys: Sequence[int] | np.ndarray) -> Facts:
    row_keys = np.array(keys, np.uint64)
    zeros = np.zeros(len(row_keys), np.int32)
    no = zeros.astype(np.bool_)
    prompts = np.zeros(len(row_keys), np.uint64)
    return Facts(zeros, zeros, zeros, zeros, zeros, zeros, no, no, row_keys, prompts)


def test_weights_of_a_mixture_are_no_repetition(tmp_path: Path, tokenizer) -> None:
    written(tmp_path / "rows.jsonl", *((f"question {number}", "answer") for number in range(20)))
    mixture = tmp_path / "mix.yaml"
    mixture.write_text("- {data: rows.jsonl, weight: 3}\n")
    held_out = written(tmp_path / "test.jsonl", ("question 3", "answer"))
    config = DataConfig(data=str(mixture), eval_data=held_out)
    train, _ = load_train_and_eval(config, tokenizer, None, seed=0)
    assert train.row_count == 60 and train.overlap == Overlap(0, 1, 1)
