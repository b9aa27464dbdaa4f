"""What nobody reads never matters, and what is wrong with the rest is told with row and column."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from graft.data.rows import Reading, read_rows
from graft.data.sources.json_values import DEPTH
from graft.errors import GraftError

LATE = pa.array([1_700_000_000_123_456_789, 2], pa.timestamp("ns"))
DEEP = "[" * 100_000 + "]" * 100_000


def _struct(depth: int) -> pa.DataType:
    kind: pa.DataType = pa.int64()
    for _ in range(depth):
        kind = pa.struct([("a", kind)])
    return kind


UNUSED = {
    "timestamps": LATE,
    "times out of range": pa.array([2**62, -(2**62)], pa.timestamp("us")),
    "dates out of range": pa.array([2**30, -(2**30)], pa.date32()),
    "durations": pa.array([2**62, 1], pa.duration("s")),
    "decimals": pa.array([decimal.Decimal("1.5"), None], pa.decimal256(60, 2)),
    "big numbers": pa.array([2**64 - 1, 0], pa.uint64()),
    "bytes": pa.array([b"\xff", None]),
    "deep": pa.array([None, None], _struct(60)),
    "dictionary": pa.array([{"a": LATE[0]}, None], pa.struct([("a", pa.timestamp("ns"))])),
}


@pytest.mark.parametrize("name", UNUSED)
def test_an_unused_column_of_parquet_does_not_matter(tmp_path, name) -> None:
    pq.write_table(pa.table({"text": ["a", "b"], name: UNUSED[name]}), tmp_path / "a.parquet")
    rows = read_rows(tmp_path / "a.parquet")
    assert [row.fields["text"] for row in rows.rows] == ["a", "b"]
    assert rows.ignored_keys == (name,)


def test_a_time_that_is_used_is_told_with_row_and_column(tmp_path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b"], "completion": LATE}), path)
    # Where pandas is installed, Arrow makes nanoseconds one of its times.
    told = "row 1: 'completion'(: not readable: Nanosecond| is of type Timestamp; expected a str)"
    with pytest.raises(GraftError, match=told):
        read_rows(path)
    when = pa.array([datetime.datetime(2026, 1, 1)] * 2)
    pq.write_table(pa.table({"prompt": ["a", "b"], "completion": when}), path)
    with pytest.raises(GraftError, match="row 1: 'completion' is of type datetime; expected a str"):
        read_rows(path)


def test_a_time_inside_a_message_is_no_obstacle(tmp_path) -> None:
    turn = pa.struct([("role", pa.string()), ("content", pa.string()), ("at", pa.timestamp("ns"))])
    talk = [
        {"role": "user", "content": "q", "at": LATE[0].value},
        {"role": "assistant", "content": "a", "at": None},
    ]
    table = pa.table({"messages": pa.array([talk], pa.list_(turn))})
    pq.write_table(table, tmp_path / "a.parquet")
    (row,) = read_rows(tmp_path / "a.parquet").rows
    assert [(one["role"], one["content"]) for one in row.fields["messages"]] == [
        ("user", "q"),
        ("assistant", "a"),
    ]


@pytest.mark.parametrize("name", ["a.arrow", "a.feather", "stream.arrow"])
def test_arrow_is_read_as_parquet_is(tmp_path, name) -> None:
    path = tmp_path / name
    table = pa.table({"text": [f"row {n}" for n in range(3000)], "late": [LATE[0]] * 3000})
    if name == "a.feather":
        feather.write_feather(table, str(path), compression="zstd")
    else:
        make = pa.ipc.new_file if name == "a.arrow" else pa.ipc.new_stream
        with make(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=700)
    rows = read_rows(path)
    assert [row.fields["text"] for row in rows.rows] == table["text"].to_pylist()
    assert rows.rows[-1].where == f"{path}:row 3000"
    assert rows.ignored_keys == ("late",)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(GraftError, match="not a readable Arrow file"):
        read_rows(path)


# JSON ---------------------------------------------------------------------------------------------

ODD = {
    "digits": "9" * 5000,
    "deep list": DEEP,
    "deep object": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "deep enough": "[" * (DEPTH + 1) + "]" * (DEPTH + 1),
    "not a number": "NaN",
    "infinite": "[Infinity, -Infinity, 1e999]",
    "a key twice": '{"a": 1, "a": 2}',
    "text with brackets": '"]}\\"[{"',
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_an_unused_key_of_json_does_not_matter(tmp_path, name, suffix) -> None:
    path = tmp_path / f"a.{suffix}"
    rows = [f'{{"n": {ODD[name]}, "text": "a"}}', f'{{"text": "b", "n": [{ODD[name]}]}}']
    path.write_text("\n".join(rows) if suffix == "jsonl" else f"[{', '.join(rows)}]")
    found = read_rows(path)
    assert [row.fields["text"] for row in found.rows] == ["a", "b"]
    assert found.ignored_keys == ("n",)


TURN = '{"role": "user", "content": "q"}'


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (f'{{"id": 1, "messages": [{TURN}, {DEEP}]}}', "'messages': it is nested too deeply"),
        (
            f'{{"messages": [{TURN}, {ODD["deep enough"]}]}}',
            f"'messages': it is nested more than {DEPTH} levels deep",
        ),
        (f'{{"text": {ODD["digits"]}}}', "'text': a number of thousands of digits"),
        ('{"text": "a", "text": "b"}', "'text': it stands twice in the row"),
        ('{"text": {"a": 1, "a": 2}}', "'text': the key 'a' stands twice in it"),
        ('{"text": "a", "n": tru}', "not valid JSON: Expecting value (column 20)"),
        (
            '{"text": "a", "n": ' + DEEP[:-1],
            "not valid JSON: it is nested too deeply, and does not",
        ),
    ],
)
def test_what_is_used_and_odd_is_told_with_row_and_column(tmp_path, row, message) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"\n{row}\n")
    with pytest.raises(GraftError) as caught:
        read_rows(path)
    assert f"{path}:2: {message}" in str(caught.value)


def test_what_stands_beside_the_rows_of_a_document_does_not_matter(tmp_path) -> None:
    path = tmp_path / "a.json"
    path.write_text(f'{{"version": {DEEP}, "data": [{{"text": "a"}}], "n": {"9" * 5000}}}')
    assert read_rows(path).rows[0].fields == {"text": "a"}


def test_lines_of_objects_are_read_whatever_json_file_they_stand_in(tmp_path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"text": "a"}\n{"text": "b"}\n\n{"text": "c"}\n')
    assert [row.where for row in read_rows(path).rows] == [f"{path}:{n}" for n in (1, 2, 4)]


def test_a_column_that_a_header_names_twice_matters_where_it_is_read(tmp_path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(",,text\n1,2,a\n")
    assert read_rows(path).rows[0].fields == {"text": "a"}
    path.write_text("text,text\n1,2\n")
    with pytest.raises(GraftError, match=":2: 'text': the header names it twice"):
        read_rows(path)
    table = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["text", "n", "n"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet").rows[0].fields == {"text": "a"}


# Encodings and formats ----------------------------------------------------------------------------

ENCODINGS = ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("a.jsonl", '{"text": "Café ☕ 𝄞"}\n{"text": "b"}', ["Café ☕ 𝄞", "b"]),
        ("a.json", '[{"text": "Café ☕ 𝄞"},\n{"text": "b"}]', ["Café ☕ 𝄞", "b"]),
        ("a.csv", "text,n\r\nCafé ☕ 𝄞,1\r\nb,2\r\n", ["Café ☕ 𝄞", "b"]),
        ("a.tsv", "text\tn\nCafé, ☕ 𝄞\t1\nb\t2\n", ["Café, ☕ 𝄞", "b"]),
        ("a.txt", "Café ☕ 𝄞\n\nb\n", ["Café ☕ 𝄞", "b"]),
    ],
)
def test_what_windows_writes_is_recognised(tmp_path, encoding, name, content, wanted) -> None:
    (tmp_path / name).write_bytes(content.encode(encoding))
    rows = read_rows(tmp_path / name)
    assert [row.fields["text"] for row in rows.rows] == wanted


def test_files_that_were_put_together_have_marks_in_the_middle(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "a"}\n\ufeff{"text": "\ufeffb"}\n', encoding="utf-8")
    assert [row.fields["text"] for row in read_rows(path).rows] == ["a", "\ufeffb"]


def test_utf_16_is_recoded_across_pieces_and_told_where_it_is_broken(tmp_path) -> None:
    path = tmp_path / "a.txt"
    text = "".join(f"𝄞 {n} Ω\n\n" for n in range(200_000))
    path.write_bytes(text.encode("utf-16"))
    rows = read_rows(path).rows
    assert (len(rows), rows[-1].fields["text"]) == (200_000, "𝄞 199999 Ω")
    path.write_bytes("a\nb\n".encode("utf-16") + b"\x00\xdc")
    with pytest.raises(GraftError, match=f"{path}: not valid UTF-16 in line 3"):
        read_rows(path)


def test_every_line_that_is_not_utf_8_is_told(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "a"}\n{"text": "café"}\n{"text": "é"}'.encode("latin-1"))
    with pytest.raises(GraftError) as caught:
        read_rows(path)
    for place in (f"{path}:2: not UTF-8 (byte 0xe9", f"{path}:3: not UTF-8 (byte 0xe9"):
        assert place in str(caught.value)
    assert "iconv -f LATIN1" in str(caught.value)


@pytest.mark.parametrize("name", ["wiki.train.tokens", "notes.md", "code.py", "data"])
def test_a_format_is_given_where_the_name_says_none(tmp_path, name) -> None:
    path = tmp_path / name
    path.write_text("a b\n\nc\n")
    with pytest.raises(GraftError, match="--data-format text"):
        read_rows(path)
    rows = read_rows(path, Reading(data_format="text"))
    assert [row.fields["text"] for row in rows.rows] == ["a b", "c"]


def test_a_format_that_is_not_known_or_packed_is_told(tmp_path) -> None:
    with pytest.raises(GraftError, match="--data-format 'txt' is unknown; did you mean 'text'"):
        read_rows(tmp_path / "a", Reading(data_format="txt"))
    with pytest.raises(GraftError, match="packed as .zst are not read; unpack it with: zstd -d"):
        read_rows(tmp_path / "a.jsonl.zst")
    (tmp_path / "a.ndjson").write_text(json.dumps({"text": "a"}))
    assert read_rows(Path(tmp_path / "a.ndjson")).kind == "text"


def test_of_a_parquet_file_that_no_layout_fits_the_renaming_is_told(tmp_path) -> None:
    pq.write_table(pa.table({"id": [1], "Frage": ["q"], "Antwort": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(GraftError, match="--columns prompt=Frage completion=Antwort"):
        read_rows(tmp_path / "a.parquet")
