"""Several files: a pattern, a folder as the hub has them, a mixture, and the hub itself."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from graft.data.config import DataConfig
from graft.data.load import load_train_and_eval
from graft.data.rows import Reading, read_rows
from graft.data.sources.places import fingerprint, sources_of
from graft.errors import GraftError


def _write(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def _texts(name: str | Path) -> list[str]:
    return [row.fields["text"] for row in read_rows(name).rows]


# Patterns and folders -----------------------------------------------------------------------------


def test_a_pattern_names_files_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 2, 1):
        _write(tmp_path / f"part-{number}.jsonl", str(number))
    assert _texts(str(tmp_path / "part-*.jsonl")) == ["1", "2", "10"]
    with pytest.raises(GraftError, match="no file has such a name"):
        read_rows(str(tmp_path / "shard-*.jsonl"))


@pytest.mark.parametrize(
    "names",
    [
        ["train.jsonl", "test.jsonl"],
        ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-0.jsonl"],
        ["train/0000.jsonl", "train/0001.jsonl", "validation/0000.jsonl"],
        ["a.jsonl", "b.jsonl"],
        ["my_train_set.jsonl", "dev.jsonl", "state.json", ".hidden/train.jsonl"],
    ],
)
def test_of_a_folder_the_training_split_is_read(tmp_path, names):
    for name in names:
        _write(tmp_path / name, name)
    (tmp_path / "README.md").write_text("# Data")
    (tmp_path / "dataset_infos.json").write_text("{}")
    wanted = [name for name in names if "train" in name and "." not in name[0]]
    assert _texts(tmp_path) == (wanted or names)
    (note,) = read_rows(tmp_path).notes
    assert note.startswith(f"{tmp_path}: {len(wanted or names)} file(s) of its training split")
    assert ("not read:" in note) == bool(wanted)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "without files of a split called train (found none)"),
        (["test.jsonl", "dev.jsonl"], "without files of a split called train (found dev.jsonl, te"),
        (
            ["main/train-0.jsonl", "socratic/train-0.jsonl"],
            "training files of several configurations, in main, socratic; name one of these",
        ),
        (["train.jsonl", "train.jsonl.gz"], "training files of several formats"),
        (["train.jsonl", "train.csv"], "training files of several formats (.csv, .jsonl)"),
    ],
)
def test_a_folder_that_may_mean_several_things_is_told(tmp_path, names, message):
    for name in names:
        _write(tmp_path / name, "a")
    with pytest.raises(GraftError) as caught:
        read_rows(tmp_path)
    assert message in str(caught.value)


# Mixtures -----------------------------------------------------------------------------------------


def _mixture(tmp_path: Path, text: str) -> str:
    (tmp_path / "mix.yaml").write_text(text)
    return str(tmp_path / "mix.yaml")


def test_rows_of_a_mixture_are_trained_as_often_as_their_weight_says(tmp_path, tokenizer):
    for name, count in (("a", 10), ("b", 11), ("c", 12)):
        _write(tmp_path / "in" / f"{name}.jsonl", *(f"{name}{n}" for n in range(count)))
    _write(tmp_path / "eval.jsonl", "e", "f")
    mix = _mixture(
        tmp_path,
        "- data: in/a.jsonl\n  weight: 2\n- in/b.jsonl\n- {data: in/c.jsonl, weight: 0.5}\n",
    )
    config = DataConfig(data=mix, eval_data=str(tmp_path / "eval.jsonl"))
    train, held_out = load_train_and_eval(config, tokenizer, None, 0)
    counts = Counter(example.where for example in train.examples)
    often = {
        name: [counts[f"{tmp_path}/in/{name}.jsonl:{n}"] for n in range(1, count + 1)]
        for name, count in (("a", 10), ("b", 11), ("c", 12))
    }
    assert often["a"] == [2] * 10
    assert often["b"] == [1] * 11
    assert sorted(often["c"]) == [0] * 6 + [1] * 6
    assert len(held_out.examples) == 2
    again, _ = load_train_and_eval(config, tokenizer, None, 0)
    assert [one.where for one in again.examples] == [one.where for one in train.examples]


def test_no_row_of_a_mixture_is_trained_and_held_out(tmp_path, tokenizer):
    _write(tmp_path / "a.jsonl", *map(str, range(40)))
    mix = _mixture(tmp_path, "- {data: a.jsonl, weight: 3}")
    config = DataConfig(data=mix, eval_fraction=0.25)
    train, held_out = load_train_and_eval(config, tokenizer, None, 0)
    assert (len(train.examples), len(held_out.examples)) == (90, 10)
    both = [{one.where for one in data.examples} for data in (train, held_out)]
    assert not both[0] & both[1]


def test_a_weight_that_leaves_no_row_of_a_source_is_told(tmp_path, tokenizer):
    _write(tmp_path / "a.jsonl", "a", "b")
    _write(tmp_path / "b.jsonl", "c", "d")
    mix = _mixture(tmp_path, "- a.jsonl\n- {data: b.jsonl, weight: 0.2}")
    config = DataConfig(data=mix, eval_data=str(tmp_path / "a.jsonl"))
    with pytest.raises(GraftError, match=r"b\.jsonl: its weight, 0\.2, leaves none of its 2"):
        load_train_and_eval(config, tokenizer, None, 0)


def test_sources_of_several_kinds_become_messages(tmp_path):
    (tmp_path / "a.csv").write_text("q,r\nhow,so\n")
    (tmp_path / "b.jsonl").write_text('{"instruction": "do", "input": "it", "output": "done"}')
    chat = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}
    (tmp_path / "c").write_text(json.dumps(chat))
    mix = _mixture(
        tmp_path,
        "- data: a.csv\n  columns: {prompt: q, completion: r}\n- data: b.jsonl\n"
        "- data: c\n  data_format: jsonl\n",
    )
    rows = read_rows(mix)
    assert rows.kind == "messages"
    said = [[one["content"] for one in row.fields["messages"]] for row in rows.rows]
    assert said == [["how", "so"], ["do\nit", "done"], ["hi", "ho"]]
    assert rows.notes == ("rows of several kinds are mixed, and all are read as messages",)
    _write(tmp_path / "d.jsonl", "t")
    with pytest.raises(GraftError, match="text rows are mixed with their like alone"):
        read_rows(_mixture(tmp_path, "- d.jsonl\n- b.jsonl\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a list of sources"),
        ("data: a.jsonl", "expected a list of sources"),
        ("- {data: a.jsonl, wieght: 2}", "source 1: unknown key 'wieght'; did you mean 'weight'"),
        ("- {data: a.jsonl, weight: 0}", "source 1: weight is 0; expected a number above 0"),
        ("- {data: a.jsonl, weight: .inf}", "source 1: weight is inf; expected"),
        ("- {weight: 1}", "source 1: data is None; expected the name of a file"),
        ("- 3", "source 1 is 3; expected keys data, weight, columns, data_format"),
        ("- {data: a.jsonl, columns: 3}", "columns is 3; expected lines of 'key: column'"),
        ("- {data: a.jsonl, data_format: txt}", "--data-format 'txt' is unknown"),
        ("- {data: a.jsonl, columns: {text: b}}", "--columns text=b: there is no column 'b'"),
        ("- a.jsonl\n- ./a.jsonl", "is there twice; give it once, with a weight"),
        ("- mix.yaml", "mix.yaml is a mixture itself; name its sources here"),
        ("- gone.jsonl", "gone.jsonl cannot be read: No such file"),
    ],
)
def test_a_mixture_that_means_nothing_is_told(tmp_path, text, message):
    _write(tmp_path / "a.jsonl", "a")
    with pytest.raises(GraftError) as caught:
        read_rows(_mixture(tmp_path, text))
    assert message in str(caught.value)


def test_flags_beside_a_mixture_are_told(tmp_path):
    _write(tmp_path / "a.jsonl", "a")
    with pytest.raises(GraftError, match="write them in it, each for its own source"):
        read_rows(_mixture(tmp_path, "- a.jsonl"), Reading(columns=("text=text",)))


def test_the_fingerprint_is_that_of_all_files(tmp_path):
    for name in ("a", "b"):
        _write(tmp_path / "in" / f"{name}.jsonl", name)
    names = [tmp_path / "in", str(tmp_path / "in" / "*.jsonl")]
    names.append(_mixture(tmp_path, "- in/a.jsonl\n- {data: in/b.jsonl, weight: 2}"))
    before = [fingerprint(name) for name in names]
    assert before == [fingerprint(name) for name in names]
    _mixture(tmp_path, "- in/a.jsonl\n- {data: in/b.jsonl, weight: 3}")
    assert fingerprint(names[2]) != before[2]
    before[2] = fingerprint(names[2])
    _write(tmp_path / "in" / "b.jsonl", "c")
    assert not {fingerprint(name) for name in names} & set(before)


# The hub ------------------------------------------------------------------------------------------


class _Data:
    """What the library gives: columns that are chosen, and rows."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows
        self.column_names = list(rows[0])

    def select_columns(self, names: list[str]) -> _Data:
        return _Data([{name: row[name] for name in names} for row in self._rows])

    def __iter__(self) -> Any:
        return iter(self._rows)


@pytest.fixture
def asked(monkeypatch) -> list[tuple[Any, ...]]:
    """The calls of a library that has the rows of gsm8k, and an image that nobody decodes."""
    calls: list[tuple[Any, ...]] = []
    library = ModuleType("datasets")

    def load_dataset(name: str, config: str | None, *, split: str, revision: str | None) -> _Data:
        calls.append((name, config, split, revision))
        if name == "gone/gone":
            raise ConnectionError("Couldn't reach the hub")
        return _Data([{"question": "q", "answer": f"a{n}", "image": object()} for n in range(3)])

    library.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    return calls


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("hub:openai/gsm8k", ("openai/gsm8k", None, "train", None)),
        ("hub:openai/gsm8k/main:test@abc123", ("openai/gsm8k", "main", "test", "abc123")),
        ("hub:gsm8k:train[:10%]", ("gsm8k", None, "train[:10%]", None)),
    ],
)
def test_data_of_the_hub_is_loaded_with_the_library(asked, name, call):
    rows = read_rows(name)
    assert asked == [call]
    assert [row.fields for row in rows.rows] == [
        {"prompt": "q", "completion": f"a{n}"} for n in range(3)
    ]
    assert rows.rows[0].where == f"{name}:row 1"
    assert rows.ignored_keys == ("image",)


def test_what_the_hub_does_not_give_is_told(asked):
    with pytest.raises(GraftError, match="hub:gone/gone cannot be loaded: Couldn't reach the hub"):
        read_rows("hub:gone/gone")
    with pytest.raises(GraftError, match="expected hub:OWNER/NAME"):
        read_rows("hub:../secret")
    with pytest.raises(GraftError, match="of the Hugging Face hub is named hub:openai/gsm8k"):
        read_rows("openai/gsm8k")


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(GraftError, match=r"pip install 'graft-llm\[hub\]'"):
        read_rows("hub:openai/gsm8k")
    assert [one.name for one in sources_of("hub:openai/gsm8k")] == ["hub:openai/gsm8k"]


def test_an_empty_name_is_not_this_folder(tmp_path, monkeypatch):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.chdir(tmp_path)
    assert [one.name for one in sources_of(".")] == ["train.jsonl"]
    with pytest.raises(GraftError, match="the name of the data is empty"):
        sources_of("")


def test_an_address_is_no_file():
    with pytest.raises(GraftError, match="https://host/rows.jsonl: graft reads no address"):
        read_rows("https://host/rows.jsonl")
