"""Documents longer than the window: all of them is trained, once, and none is torn apart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.data.config import DataConfig
from graft.data.encode import encode_rows
from graft.data.load import load_train_and_eval
from graft.data.rows import Row, Rows
from graft.data.shapes import text as text_shape
from graft.data.split import MOST_HELD_OUT, held_out_examples
from graft.errors import GraftError


def windows(text, tokenizer, max_length, stride=None, eos=True):
    rows = Rows("text", [Row("book.txt:1", {"text": text})], ())
    return encode_rows(
        rows, tokenizer, max_length=max_length, eos=eos, separator="\n", stride=stride
    )


@pytest.mark.parametrize("bos", [False, True])
@given(
    count=st.integers(2, 60),
    max_length=st.integers(3, 20),
    stride=st.none() | st.integers(1, 25),
    eos=st.booleans(),
)
def test_every_token_of_a_document_is_trained_once(
    build_tokenizer, bos, count, max_length, stride, eos
):
    tokenizer = build_tokenizer(bos=bos)
    text = "".join(chr(ord("a") + index % 26) for index in range(count))
    whole = windows(text, tokenizer, 10_000, eos=eos).examples[0]
    data = windows(text, tokenizer, max_length, stride, eos)
    assert data.row_count == 1
    trained = []
    for number, example in enumerate(data.examples):
        assert len(example.input_ids) <= max_length
        assert example.window == number
        assert (example.cut, example.lost) == (False, 0)
        assert not example.targets[0]
        if bos:
            assert example.input_ids[0] == whole.input_ids[0]
        pairs = zip(example.input_ids, example.targets, strict=True)
        trained += [token for token, target in pairs if target]
    wanted = zip(whole.input_ids, whole.targets, strict=True)
    assert trained == [token for token, target in wanted if target]


def test_a_stride_gives_each_window_what_stood_before_it(build_tokenizer):
    tokenizer = build_tokenizer(bos=False)
    data = windows("abcdefghij", tokenizer, 6, stride=4, eos=False)
    assert [tokenizer.decode(example.input_ids) for example in data.examples] == [
        "abcdef",
        "efghij",
    ]
    assert [example.targets for example in data.examples] == [
        [False] + [True] * 5,
        [False] * 2 + [True] * 4,
    ]
    assert "1 text rows in 2 windows, 12 tokens, 9 of them trained" in data.summary()


def test_an_answer_that_is_too_long_is_cut_and_what_is_lost_is_told(tokenizer):
    rows = Rows("prompt", [Row("d:1", {"prompt": "p", "completion": "x" * 95})], ())
    data = encode_rows(rows, tokenizer, max_length=49, eos=True, separator="\n")
    (example,) = data.examples
    assert (example.cut, example.lost, data.lost_tokens) == (True, 50, 50)
    assert "1 rows cut (50 tokens lost, 50.5% of all)" in data.summary()


def test_a_stride_below_one_is_refused(tokenizer, write_lines):
    path = write_lines("a.txt", "some text")
    with pytest.raises(GraftError, match="--stride 0: expected at least 1 token"):
        load_train_and_eval(DataConfig(data=path, stride=0), tokenizer, 8, seed=0)


def test_one_long_document_is_trained_and_held_out_in_parts(tokenizer, write_lines):
    path = write_lines("book.txt", *["Tom had a red ball."] * 100)
    config = DataConfig(data=path, max_length=64)
    train, held_out = load_train_and_eval(config, tokenizer, None, seed=0)
    whole = windows("\n".join(["Tom had a red ball."] * 100), tokenizer, 64)
    assert train.target_tokens + held_out.target_tokens == whole.target_tokens
    assert len(held_out.examples) == round(len(whole.examples) * 0.05)
    assert train.eos_rows == 1


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    fraction=st.floats(0.01, 0.9),
    seed=st.integers(0, 5),
)
def test_windows_of_a_row_stay_together(sizes, fraction, seed):
    flat = [window for size in sizes for window in range(size)]
    row_of = [row for row, size in enumerate(sizes) for _ in range(size)]
    chosen = held_out_examples(flat, fraction, seed)
    assert len(chosen) <= min(max(round(len(flat) * fraction), 1), MOST_HELD_OUT)
    assert bool(chosen) == (len(flat) > 1)
    rows = {row_of[index] for index in chosen}
    torn = [row for row in rows if {i for i, r in enumerate(row_of) if r == row} - chosen]
    assert len(torn) <= 1
    if torn:  # there was no row that is small enough
        assert rows == set(torn)
        assert max(sizes) == sizes[torn[0]]


def test_a_long_text_is_tokenised_in_parts_that_end_between_lines(tokenizer, monkeypatch):
    monkeypatch.setattr(text_shape, "PART", 40)
    text = "one two three\n" * 20 + "a b " * 30 + "x" * 100
    row = text_shape.TEXT.render({"text": text}, tokenizer, "")
    places = [0, *row.seams, len(text)]
    assert all(0 < end - begin <= 40 for begin, end in zip(places, places[1:], strict=False))
    assert all(text[place - 1] == "\n" for place in row.seams if place < 270)
    assert all(text[place] == " " for place in row.seams if 290 < place < 390)
    example = windows(text, tokenizer, 10_000).examples[0]
    assert tokenizer.decode(example.input_ids) == f"<s>{text}</s>"
