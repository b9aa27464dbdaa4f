"""From a configuration to training and held-out data: splits, limits, errors of both files."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from graft.data.config import DataConfig
from graft.data.load import load_examples, load_train_and_eval, resolve_max_length
from graft.data.rows import Reading, read_rows
from graft.errors import GraftError


def lines(count: int, word: str = "row") -> list[str]:
    return [json.dumps({"text": f"{word} {number}"}) for number in range(count)]


def wheres(data) -> list[int]:
    return [int(example.where.rsplit(":", 1)[1]) for example in data.examples]


@pytest.mark.parametrize(
    ("asked", "limit", "expected"),
    [(None, None, 1024), (None, 256, 256), (None, 8192, 1024), (256, 256, 256), (4096, None, 4096)],
)
def test_max_length(asked, limit, expected):
    assert resolve_max_length(DataConfig(data="d", max_length=asked), limit) == expected


def test_max_length_out_of_range():
    with pytest.raises(GraftError, match="--max-length 257: the model's limit is 256 positions"):
        resolve_max_length(DataConfig(data="d", max_length=257), 256)
    with pytest.raises(GraftError, match="--max-length 1: expected at least 2"):
        resolve_max_length(DataConfig(data="d", max_length=1), 256)


@pytest.mark.parametrize(
    ("rows", "fraction", "held"), [(2, 0.05, 1), (100, 0.05, 5), (3, 0.9, 2), (600, 0.95, 500)]
)
def test_the_held_out_rows(write_lines, tokenizer, rows, fraction, held):
    config = DataConfig(data=write_lines("a.jsonl", *lines(rows)), eval_fraction=fraction)
    train, held_out = load_train_and_eval(config, tokenizer, 64, seed=3)
    assert len(held_out.examples) == held
    assert sorted(wheres(train) + wheres(held_out)) == list(range(1, rows + 1))
    assert wheres(train) == sorted(wheres(train))
    again = load_train_and_eval(config, tokenizer, 64, seed=3)
    assert again == (train, held_out)


def test_the_split_follows_the_seed(write_lines, tokenizer):
    config = DataConfig(data=write_lines("a.jsonl", *lines(200)))
    chosen = {
        tuple(wheres(load_train_and_eval(config, tokenizer, 64, seed=seed)[1])) for seed in range(4)
    }
    assert len(chosen) == 4


def test_eval_data_of_its_own(write_lines, tokenizer):
    config = DataConfig(
        data=write_lines("a.jsonl", *lines(3)),
        eval_data=write_lines("b.jsonl", '{"prompt": "p", "completion": "c"}'),
    )
    train, held_out = load_train_and_eval(config, tokenizer, 64, seed=0)
    assert (len(train.examples), train.kind) == (3, "text")
    assert (len(held_out.examples), held_out.kind) == (1, "prompt")
    assert held_out == load_examples(str(config.eval_data), tokenizer, config, 64)


def test_bad_rows_of_both_files_are_told_at_once(write_lines, tokenizer):
    train = write_lines("a.jsonl", '{"text": ""}')
    held_out = write_lines("b.jsonl", '{"text": "a"}', "oops")
    config = DataConfig(data=train, eval_data=held_out)
    with pytest.raises(GraftError) as caught:
        load_train_and_eval(config, tokenizer, 64, seed=0)
    assert f"{train}:1: 'text' is empty" in str(caught.value)
    assert f"{held_out}:2: not valid JSON" in str(caught.value)


def test_what_cannot_be_split(write_lines, tokenizer):
    path = write_lines("a.jsonl", *lines(1))
    with pytest.raises(GraftError, match="1 row, so none can be held out.*or --eval-data"):
        load_train_and_eval(DataConfig(data=path), tokenizer, 64, seed=0)
    for fraction in (0.0, 1.0, -1.0):
        config = DataConfig(data=path, eval_fraction=fraction)
        with pytest.raises(GraftError, match="--eval-fraction .*: expected between 0 and 1"):
            load_train_and_eval(config, tokenizer, 64, seed=0)


def test_an_eos_that_is_never_trained_is_an_error(write_lines, tokenizer):
    rows = ['{"prompt": "", "completion": "long row"}'] * 10
    path = write_lines("a.jsonl", *rows)
    with pytest.raises(GraftError, match="never trained, because all rows are cut at 6 tokens"):
        load_train_and_eval(DataConfig(data=path), tokenizer, 6, seed=0)
    config = DataConfig(data=path, eos=False)
    train, _ = load_train_and_eval(config, tokenizer, 6, seed=0)
    assert (train.cut_rows, train.eos_rows, train.lost_tokens) == (9, 0, 9 * 3)
    assert "9 rows cut (27 tokens lost, 33.3% of all)" in train.summary()


def test_a_tokenizer_without_eos_is_told_before_the_file_is_read(build_tokenizer):
    config = DataConfig(data="gone.jsonl")
    with pytest.raises(GraftError, match="names no end-of-sequence token"):
        load_train_and_eval(config, build_tokenizer(eos=None), 64, seed=0)


@pytest.mark.parametrize(
    ("name", "kind", "rows"),
    [
        ("e2e_nlg/valid.jsonl.gz", "prompt", 4672),
        ("tinystories/train.jsonl.gz", "text", 850),
        ("tinyshakespeare/input.txt.gz", "text", 7222),
        ("instruct/identity.json", "instruction", 91),
        ("instruct/messages_openai_chat.jsonl.gz", "messages", 150),
        ("instruct/fastchat_dummy_conversation_messages.jsonl.gz", "messages", 500),
    ],
)
def test_real_files(shared_models, shared_data, name, kind, rows):
    tokenizer = AutoTokenizer.from_pretrained(shared_models / "mixed-13m")
    path = str(shared_data / name)
    data = load_examples(path, tokenizer, DataConfig(data=path), 100_000)
    assert (data.kind, len(data.examples), data.cut_rows, data.eos_rows) == (kind, rows, 0, rows)


@pytest.mark.parametrize(
    ("name", "flags", "kind", "rows"),
    [
        ("gsm8k/test.jsonl.gz", {}, "prompt", 1319),
        ("e2e_nlg/official_devset.csv.gz", {}, "prompt", 4672),
        ("instruct/dpo_en_300.json.gz", {}, "messages", 300),
        ("instruct/kto_en_300_messages.json.gz", {}, "messages", 150),
        ("instruct/identity.json", {}, "instruction", 91),
        (
            "instruct/seed_tasks_175.jsonl.gz",
            {
                "columns": (
                    "instruction=instruction",
                    "input=instances.0.input",
                    "output=instances.0.output",
                )
            },
            "instruction",
            175,
        ),
        ("wikitext-2/wiki.valid.tokens.gz", {"data_format": "text"}, "text", 1160),
    ],
)
def test_real_files_of_other_layouts_are_read(shared_data, name, flags, kind, rows):
    found = read_rows(shared_data / name, Reading(**flags))
    assert (found.kind, len(found.rows)) == (kind, rows)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        (
            "instruct/seed_tasks_175.jsonl.gz",
            "--columns instruction=instruction input=instances.0.input output=instances.0.output",
        ),
        ("wikitext-2/wiki.test.tokens.gz", "--data-format text"),
    ],
)
def test_of_real_files_that_are_not_recognised_the_flag_is_named(shared_data, name, flags):
    with pytest.raises(GraftError) as caught:
        read_rows(shared_data / name)
    assert flags in str(caught.value)
