"""What lies in a comparison's folder is checked before it is believed."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from graft.api.events import Events
from graft.comparison import run as comparing
from graft.comparison.config import CompareConfig
from graft.comparison.contenders import Contender, Entry, entries, parse_contenders
from graft.comparison.prepare import _write_rows
from graft.comparison.results import Result, read_result
from graft.comparison.run import compare
from graft.data.rows import Row, read_rows
from graft.errors import GraftError

ENTRY = Entry(Contender("lora"), None, 0)
GOOD = Result(contender="lora", bits=None, seed=0, loss=1.0, perplexity=math.e, texts=("a", "b"))


class Notes(Events):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(asdict(GOOD)))
    assert read_result(path, ENTRY, 2) == GOOD


@pytest.mark.parametrize(
    "change",
    [
        {"contender": "../../lora"},
        {"contender": "qalora"},
        {"seed": 1},
        {"bits": 4},
        {"loss": "1"},
        {"loss": None},
        {"perplexity": None},
        {"loss": math.nan},
        {"bleu": math.inf},
        {"file_bytes": 1.5},
        {"texts": "ab"},
        {"texts": ["a"]},
        {"texts": ["a", "\ud83d"]},
        {"texts": [["a"], "b"]},
    ],
)
def test_a_result_that_is_none_is_refused(tmp_path: Path, change: dict) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**asdict(GOOD), **change}))
    with pytest.raises(GraftError, match="a.json (is damaged|holds half)"):
        read_result(path, ENTRY, 2)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"loss": 1}'])
def test_a_file_of_results_that_is_torn_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(GraftError, match="a.json"):
        read_result(path, ENTRY, 2)


def test_damaged_results_are_told_and_scored_again(
    tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    config = CompareConfig(
        model=str(tiny_base), data=str(rows), out=str(tmp_path / "out"), contenders=("base+rtn",),
        bits=(4,), seeds=1, steps=1, generate=0, batch_size=4, dtype="float32",
    )  # fmt: skip
    first = compare(config)
    (file,) = (tmp_path / "out" / "results").iterdir()
    stored = file.read_bytes()
    file.write_bytes(stored[: len(stored) // 2])
    notes = Notes()
    again = compare(config, notes)
    (told,) = [note for note in notes.notes if f"{file} is no valid JSON" in note]
    assert told.endswith("; it is scored again")
    same = [replace(one.results[0], deploying_seconds=None) for one in (first, again)]
    assert same[0] == same[1] and json.loads(file.read_bytes())["loss"] == first.results[0].loss
    settings = tmp_path / "out" / "settings.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "rank": "x" * 10**6}))
    with pytest.raises(GraftError, match="rank is None, was 'xxx") as raised:
        compare(config)
    assert len(str(raised.value)) < 1000
    settings.write_text("[")
    with pytest.raises(GraftError, match="settings.json is no valid JSON"):
        compare(config)


def test_the_costs_of_a_run_are_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = entries(parse_contenders(["lora"]), (4,), 1)[0].training
    folder = tmp_path / "runs" / "lora-seed0"
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps({"perplexity": "2", "seconds": None}))

    class There(comparing._Comparing):
        def __init__(self) -> None:
            self.out = tmp_path

    with pytest.raises(GraftError, match=r"(?s)report.json is damaged.*perplexity is '2'"):
        There()._costs(training)


@pytest.mark.parametrize("word", ["../lora", "lora+../x", "lora@/etc", "lora+", "a/b", "lora\0"])
def test_no_contender_has_a_name_that_leaves_the_folder(word: str) -> None:
    with pytest.raises(GraftError, match="--contenders"):
        parse_contenders([word])


def test_every_name_of_a_file_is_one_part_of_a_path() -> None:
    words = ["base", "base+rtn", "lora", "lora+gptq", "qalora", "qlora", "qalora@rtn"]
    for entry in entries(parse_contenders(words), (2, 4), 2):
        assert Path(entry.name).name == entry.name
        if entry.training is not None:
            assert Path(entry.training.name).name == entry.training.name


def test_rows_that_are_written_out_are_what_was_read(tmp_path: Path) -> None:
    message = {"role": "user", "content": "ü", "name": "\ud83d", "image": b"1"}
    answer = {"role": "assistant", "content": "a"}
    _write_rows(tmp_path / "a.jsonl", [Row("a:1", {"messages": [message, answer]})])
    (row,) = read_rows(tmp_path / "a.jsonl").rows
    assert row.fields["messages"] == [{**message, "image": "<bytes>"}, answer]
    assert "ü" in (tmp_path / "a.jsonl").read_text(encoding="utf-8")
