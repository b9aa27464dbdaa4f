"""Every format, plain and compressed, against rows and line numbers written by hand."""

from __future__ import annotations

import csv
import gzip
import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graft.data.sources.files import read_records
from graft.data.sources.places import fingerprint
from graft.data.sources.record import Record
from graft.errors import GraftError

ROWS = [
    {"prompt": "name : Café", "completion": "Das Café,\n“gut” . \u2028 end"},
    {"prompt": 'say "hi"', "completion": "hi"},
]
JSONL = (
    '{"prompt": "name : Café", "completion": "Das Café,\\n“gut” . \u2028 end"}\n'
    "\n"
    '{"prompt": "say \\"hi\\"", "completion": "hi"}\n'
)
JSON = (
    "[\n"
    '  {"prompt": "name : Café",\n'
    '   "completion": "Das Café,\\n“gut” . \u2028 end"},\n'
    '\n  {"prompt": "say \\"hi\\"", "completion": "hi"}\n'
    "]\n"
)
CSV = 'prompt,completion\r\nname : Café,"Das Café,\n“gut” . \u2028 end"\r\n"say ""hi""",hi\r\n'
TEXT = "\n\nFirst line\nsecond line\n   \n\r\nOther\r\ndocument\r\n"


def parquet_bytes(rows: list[dict]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


# Without the time in its header: a test has the same name in every run.
CUT_OFF = gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:-12]


def write(tmp_path: Path, name: str, content: str | bytes, gz: bool = False) -> Path:
    content = content.encode() if isinstance(content, str) else content
    path = tmp_path / (name + ".gz" * gz)
    path.write_bytes(gzip.compress(content) if gz else content)
    return path


def read(path: Path) -> tuple[list[Record], list[Record]]:
    """Return the good rows and those with a problem."""
    records = list(read_records(path))
    bad = [record for record in records if record.problem is not None]
    return [record for record in records if record not in bad], bad


@pytest.mark.parametrize("gz", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(
    ("name", "content", "rows", "lines"),
    [
        ("a.jsonl", JSONL, ROWS, ["1", "3"]),
        ("a.b.JSONL", "\ufeff" + JSONL, ROWS, ["1", "3"]),
        ("a.json", JSON, ROWS, ["2", "5"]),
        ("a.json", '{"n": [1], "data":\n' + JSON + ', "x": {}}', ROWS, ["3", "6"]),
        ("a.json", '{"n": 1,\n"train": [{"n": 2}], "test": [3]}', [{"n": 2}], ["2"]),
        ("a.json", '{"n": [],\n"data":\n[{"n": 2}], "m": {}}', [{"n": 2}], ["3"]),
        ("a.csv", "text\ra\r\rb\r", [{"text": "a"}, {"text": "b"}], ["2", "4"]),
        ("a.csv", CSV, ROWS, ["2", "4"]),
        ("a.csv", "\ufeff" + CSV, ROWS, ["2", "4"]),
        ("a.parquet", parquet_bytes(ROWS), ROWS, ["row 1", "row 2"]),
        (
            "a.txt",
            TEXT,
            [{"text": "First line\nsecond line"}, {"text": "Other\ndocument"}],
            ["3", "7"],
        ),
        ("a.txt", "no newline", [{"text": "no newline"}], ["1"]),
    ],
)
def test_rows_and_their_lines(tmp_path, gz, name, content, rows, lines):
    path = write(tmp_path, name, content, gz)
    records = list(read_records(path))
    assert [record.problem for record in records] == [None] * len(rows)
    assert [record.value for record in records] == rows
    assert [record.where for record in records] == [f"{path}:{line}" for line in lines]


def test_nested_rows_survive_parquet(tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write(tmp_path, "a.parquet", parquet_bytes([{"messages": messages}]))
    assert next(read_records(path)).value == {"messages": messages}


def test_a_long_csv_cell_is_read_and_the_global_limit_stays(tmp_path):
    limit = csv.field_size_limit()
    path = write(tmp_path, "a.csv", "text\n" + "x" * 200_000 + "\n")
    assert next(read_records(path)).value == {"text": "x" * 200_000}
    assert csv.field_size_limit() == limit


def test_bad_lines_are_problems_and_good_ones_are_rows(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"text": "a"}\n{"text": \n\n{"text": "b"}\nnull x\n')
    good, bad = read(path)
    assert [record.value for record in good] == [{"text": "a"}, {"text": "b"}]
    assert [record.where for record in bad] == [f"{path}:2", f"{path}:5"]
    assert "not valid JSON: Expecting value (column" in bad[0].problem


def test_csv_rows_of_another_width_are_problems(tmp_path):
    path = write(tmp_path, "a.csv", 'a,b\n1,2\n"x\ny",2,3\n4\n5,6\n')
    good, bad = read(path)
    assert [record.where for record in good] == [f"{path}:2", f"{path}:6"]
    assert [f"{record.where}: {record.problem}".split(" (")[0] for record in bad] == [
        f"{path}:3: 3 cells, but the header names 2 columns",
        f"{path}:5: 1 cells, but the header names 2 columns",
    ]
    assert [record.value for record in bad] == [["x\ny", "2", "3"], ["4"]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "the file is empty"),
        ("a.json", b" \n\n", "the file is empty"),
        ("a.json", b"[]", "holds no rows"),
        ("a.csv", b"text\n", "holds no rows"),
        ("a.parquet", parquet_bytes([{"text": "a"}])[:-9], "not a readable Parquet file"),
        ("a.txt", b"a\n\nb\n\xff", r":4: not UTF-8 \(byte 0xff, which is byte 1 of"),
        ("a.json", b'[{"text": "a"},\n{"text" "b"}]', r":2: not valid JSON: Expecting ':' delim"),
        ("a.json", b'[{"text": "a"},\n]', r"not valid JSON"),
        ("a.json", b'{"data": [1]} 2', r":1: .*Extra data.*name the file \.jsonl"),
        ("a.json", b'{"docs": [], "data": 3}', "an object with keys docs, data; expected a list"),
        ("a.json", b'{"data": [],\n"data": [1]}', ":2: the key 'data' stands here twice"),
        ("a.json", b'{"train": [],\n"rows": [1]}', ":2: lists of rows under 'train' and 'rows'"),
        ("a.json", b"3", "found int; expected a list of objects"),
        ("a.csv", b"a;b\n1;2\n", ":1: the header is one cell, with ';' in it"),
        (
            "a.tsv",
            b"a,b\n1,2\n",
            "cells are not apart by tabs; save it so, or pass --data-format csv",
        ),
        (
            "a.jsonl",
            b"version https://git-lfs.github.com/spec/v1\n",
            "a pointer of Git LFS, and not",
        ),
        ("a.csv", b'a\nx\n"open\nz\n', ":3: not valid CSV: unexpected end of data"),
        ("a.jsonl.gz", b"plain", "not a complete gzip file"),
        ("a.jsonl.gz", CUT_OFF, "not a complete gzip file"),
        (
            "a.tokens",
            b"a",
            r"unknown suffix '\.tokens'; .*--data-format text",
        ),
        ("a.gz", b"a", "the name has no suffix; expected one of"),
        ("data", b"a", "the name has no suffix; expected one of"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(GraftError, match=message) as caught:
        list(read_records(path))
    assert str(caught.value).startswith(str(path))


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(GraftError, match="cannot be read: No such file"):
        list(read_records(tmp_path / "gone.jsonl"))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(GraftError, match="is no regular file, but a folder"):
        list(read_records(tmp_path / "folder.jsonl"))
    with pytest.raises(GraftError, match="cannot be read: No such file"):
        fingerprint(tmp_path / "gone.jsonl")


def test_fingerprint_is_the_sha256_of_the_bytes(tmp_path):
    path = write(tmp_path, "a.jsonl", JSONL, gz=True)
    assert fingerprint(path) == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("name", "content", "values"),
    [
        ("a.jsonl", '{"text": "a"}\r{"text": "b"}\r', [{"text": "a"}, {"text": "b"}]),
        ("a.txt", "a\rb\r\rc\r", [{"text": "a\nb"}, {"text": "c"}]),
        ("a.csv", 'text\r"a\rb"\rc\r', [{"text": "a\nb"}, {"text": "c"}]),
    ],
)
def test_lines_of_an_old_mac_end_in_a_carriage_return(tmp_path, name, content, values):
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert [record.value for record in read_records(path)] == values


def test_a_parquet_file_without_rows_is_not_called_empty(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(GraftError, match="the file holds no rows"):
        list(read_records(tmp_path / "a.parquet"))
