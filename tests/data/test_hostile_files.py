"""Files that would take all time or memory, or are no files: refused, and soon."""

from __future__ import annotations

import gzip
import json
import os
import socket
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graft.data.rows import read_rows
from graft.data.sources.files import read_records
from graft.data.sources.places import fingerprint
from graft.data.sources.stream import EXPANDED_BYTES, LINE_BYTES
from graft.errors import GraftError

MIB = 2**20


def refused(path: Path, message: str, most_mib: int = 200) -> None:
    """Reading the file is refused with a message, and takes no more than so much memory."""
    tracemalloc.start()
    try:
        with pytest.raises(GraftError, match=message) as caught:
            read_rows(path)
        assert tracemalloc.get_traced_memory()[1] < most_mib * MIB
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 10_000


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "socket", "link"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.txt.gz", "a.json"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, monkeypatch, kind, name) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    path = Path(name)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(path)
    else:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
    for reads in (fingerprint, read_rows):
        with pytest.raises(GraftError, match="is no regular file|cannot be read|a folder without"):
            reads(path)


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.txt.gz", "a.parquet.gz"]
)
def test_a_bomb_is_not_decompressed(tmp_path, name, monkeypatch) -> None:
    monkeypatch.setenv("GRAFT_BOUNDS", "0.25")
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"\n" + (b" " * 999 + b"\n") * (EXPANDED_BYTES // 2000), 1))
    refused(path, "becomes more than 4,194,304 bytes when it is decompressed")


def test_a_small_file_that_repeats_itself_is_read(tmp_path) -> None:
    path = tmp_path / "a.jsonl.gz"
    rows = b'{"text": "the same over and over again"}\n' * 20_000
    path.write_bytes(gzip.compress(rows))
    assert len(rows) > 300 * path.stat().st_size
    assert len(read_rows(path).rows) == 20_000


def test_the_bound_of_a_large_file_grows_with_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GRAFT_BOUNDS", "0.02")  # of any file 335,544 bytes, or its size twice
    rows = "".join(f'{{"text": "{n:09d}{n:09d}{n:09d}"}}\n' for n in range(16_000)).encode()
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(rows))
    refused(path, "GRAFT_BOUNDS=10 for bounds ten times as wide")
    monkeypatch.setenv("GRAFT_BOUNDS", "0.3")
    assert len(read_rows(path).rows) == 16_000


@pytest.mark.parametrize(
    ("name", "begin", "rest", "what"),
    [
        ("a.jsonl", b'{"text": "', b"x", "line"),
        ("a.txt", b"", b"x", "line"),
        ("a.txt", b"", b"x" * 999 + b"\n", "document"),
        ("a.csv", b'text\n"', b"x" * 999 + b"\n", "row"),
        ("a.csv", b"text\n", b"\0", "line"),
    ],
)
def test_a_row_without_end_is_not_read(tmp_path, monkeypatch, name, begin, rest, what) -> None:
    monkeypatch.setenv("GRAFT_BOUNDS", "0.125")
    path = tmp_path / name
    path.write_bytes(begin + rest * (LINE_BYTES // 4 // len(rest)))
    refused(path, f":[12]: a {what} .*of more than 4,194,304 bytes")


def test_a_sparse_file_is_not_read_to_its_end(tmp_path) -> None:
    for name in ("a.jsonl", "a.csv", "a.txt"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(2**40)
        refused(tmp_path / name, ":1: a line of more than")


def test_a_document_is_read_whole_within_a_bound(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GRAFT_BOUNDS", "0.001")
    with open(tmp_path / "a.json", "wb") as file:
        file.truncate(2**40)
    refused(tmp_path / "a.json", "at most 2,147,483 bytes of a file that is one value")


@pytest.mark.parametrize("deep", ["[" * 200_000, '{"a":' * 200_000])
def test_json_that_is_nested_too_deeply_is_a_problem_of_its_row(tmp_path, deep) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' + deep + "\n")
    refused(path, ":2: not valid JSON: it is nested too deeply")
    (tmp_path / "a.json").write_text("[" + deep)
    refused(tmp_path / "a.json", ":1: not valid JSON: it is nested too deeply")


def test_a_number_of_a_million_digits_is_a_problem_where_it_is_read(tmp_path) -> None:
    for name, begin, end in (("a.jsonl", "", ""), ("a.json", "[", "]")):
        number = "9" * 10**6
        path = tmp_path / name
        path.write_text(f'{begin}{{"text": "a", "n": {number}}}{end}')
        assert read_rows(path).rows[0].fields == {"text": "a"}
        path.write_text(f'{begin}{{"n": 1, "text": {number}}}{end}')
        refused(path, f"{name}:1: 'text': a number of thousands of digits")
        path.write_text(f"{begin}{number}{end}")
        refused(path, f"{name}:1: not valid JSON: a number of thousands of digits")


def test_many_bad_rows_are_counted_and_not_kept(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("1\n" * 20_000_000)
    refused(path, "at least 10000 problems\n(.*\n)*  and 9980 more", most_mib=10)


def test_a_row_of_many_keys_is_told_in_a_few_words(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({f"\x1b[31mkey {n}" * 99: n for n in range(2000)}))
    refused(path, r"found keys \\x1b\[31mkey 0.* and 1,990 more; accepted keys")


def test_many_columns_take_time_in_proportion(tmp_path) -> None:
    columns = ",".join(f"c{n}" for n in range(100_000))
    (tmp_path / "a.csv").write_text(f"text,{columns}\nx{',' * 100_000}\n")
    rows = read_rows(tmp_path / "a.csv")
    assert rows.rows[0].fields == {"text": "x"} and len(rows.ignored_keys) == 100_000
    (tmp_path / "a.csv").write_text(f"{columns},{columns}\n{',' * 199_999}\n")
    refused(tmp_path / "a.csv", ":2: found keys c0, .* and 99,990 more; accepted")


def test_half_a_surrogate_pair_is_a_problem_of_its_row(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{"text": "\\ud83d"}\n{"\\ud83d": "\\ud83d"}\n')
    refused(path, r":2: 'text' holds half of a surrogate pair(.*\n)*.*:3: found keys \\ud83d;")


@pytest.mark.parametrize("name", ["a.txt", "a.csv"])
def test_a_zero_byte_is_no_text(tmp_path, name) -> None:
    (tmp_path / name).write_bytes(b"text\nwo\0rds\n")
    refused(tmp_path / name, ":2: a zero byte, so this is no text")


def test_a_zero_character_of_json_is_a_character(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\u0000b"}')
    assert read_rows(tmp_path / "a.jsonl").rows[0].fields == {"text": "a\0b"}


def test_parquet_that_holds_more_than_its_size_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GRAFT_BOUNDS", "0.25")
    path = tmp_path / "a.parquet"
    table = pa.table({"text": pa.array(["x" * 10_000]).take(pa.array([0] * 10_000))})
    pq.write_table(table, path, compression="zstd")
    assert path.stat().st_size < 10_000 and table.nbytes > 90 * MIB
    refused(path, "its rows have more than 4,194,304 bytes")


def test_parquet_with_nested_and_repeated_values_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GRAFT_BOUNDS", "0.25")
    path = tmp_path / "a.parquet"
    words = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000), pa.array(["x" * 20_000]))
    pq.write_table(pa.table({"text": words}), path)
    assert path.stat().st_size < 10 * 10**5
    refused(path, "its rows have more than|took more than|ArrowMemoryError")
    messages = pa.array([[{"role": "user", "content": "x" * 1000}] * 20_000])
    pq.write_table(pa.table({"messages": messages}), path, compression="zstd")
    refused(path, "a row of more than|took more than|ArrowMemoryError|MemoryError")


def test_parquet_reads_the_keys_alone(tmp_path) -> None:
    path = tmp_path / "a.parquet"
    times = pa.array([1, 2], pa.timestamp("ns"))
    texts = pa.array([b"\xff", b"ok"]).cast(pa.binary()).view(pa.binary())
    invalid = pa.Array.from_buffers(pa.string(), 2, texts.buffers())
    pq.write_table(pa.table({"text": ["a", "b"], "time": times, "image": [b"1", b"2"]}), path)
    rows = read_rows(path)
    assert [dict(row.fields) for row in rows.rows] == [{"text": "a"}, {"text": "b"}]
    assert rows.ignored_keys == ("image", "time")
    pq.write_table(pa.table({"text": [b"1", b"2"]}), path)
    refused(path, "row 1: 'text' is of type bytes; expected a string")
    pq.write_table(pa.table({"text": invalid}), path)
    refused(path, "row 1: 'text': not readable: 'utf-8' codec can't decode byte 0xff")
    pq.write_table(pa.table({"words": ["a"] * 30}), path)
    refused(path, "30 problems\n.*row 1: found keys words; accepted keys")


def test_a_reader_of_parquet_that_dies_is_told(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"]}), path)
    monkeypatch.setattr("graft.data.sources.parquet.MEMORY", 300 * MIB)
    refused(path, "not a readable Parquet file: .*(Error|300 MiB)")


def test_records_know_where_they_stand_when_reading_ends_early(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 3)
    first = next(read_records(path))
    assert (first.where, first.value) == (f"{path}:1", {"text": "a"})


@pytest.mark.parametrize("row", [{"\0": "a\0b"}, {"text": {"\0": "a\0b"}}, {"text": [{"\0": "a"}]}])
def test_no_column_of_parquet_passes_for_another_kind_of_value(row, tmp_path) -> None:
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", "a column, or a field in it, has a zero byte in its name")


def test_parquet_of_too_many_rows_is_refused_before_any_is_read(tmp_path) -> None:
    path = tmp_path / "many.parquet"
    pq.write_table(pa.table({"text": pa.array(["x"]).take(pa.array([0] * 2_000_000))}), path)
    rows = read_records(path)
    with pytest.raises(GraftError, match=r"its rows have more than 16,777,216 bytes"):
        next(rows)
