"""Data as people have them, from the command line to the run's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graft.cli.main import main

WORDS = "red green blue lamp chair table oak steel light heavy small large".split()


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A mixture of questions, of which two are bad, and of a table with names of its own."""
    rows = [{"question": f"{word} what", "answer": f"{word} oak"} for word in WORDS]
    lines = [json.dumps(row) for row in rows]
    lines[3:3] = ['{"question": "open', '{"question": "red", "answer": ""}']
    (tmp_path / "asked.jsonl").write_text("\n".join(lines))
    cells = "".join(f"{word},{word} steel\n" for word in WORDS)
    (tmp_path / "table.csv").write_text(f"mine,yours\n{cells}")
    (tmp_path / "mix.yaml").write_text(
        "- {data: asked.jsonl, weight: 2}\n"
        "- {data: table.csv, columns: {prompt: mine, completion: yours}}\n"
    )
    return tmp_path


def _train(base: Path, sources: Path, *flags: str) -> int:
    words = ("--model", str(base), "--out", str(sources / "run"), "--method", "lora")
    return main(("train", *words, "--rank", "2", "--max-length", "32", "--steps", "2", *flags))


def test_a_mixture_is_trained_without_its_bad_rows(tiny_base, sources, capfd):
    data = ("--data", str(sources / "mix.yaml"))
    assert _train(tiny_base, sources, *data) == 1
    told = capfd.readouterr().err
    assert f"{sources}/asked.jsonl:4: not valid JSON" in told
    assert f"{sources}/asked.jsonl:5: 'completion' (column 'answer') is empty" in told
    assert _train(tiny_base, sources, *data, "--skip-bad-rows", "--save-every", "1") == 0
    told = " ".join("".join(capfd.readouterr()).split())
    assert "2 bad rows are skipped" in told
    assert "the first row: its prompt ends in 'red what', then comes '\\n' (--separator)" in told
    run = sources / "run"
    skipped = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert [(one["where"], one["row"]) for one in skipped] == [
        (f"{sources}/asked.jsonl:4", '{"question": "open'),
        (f"{sources}/asked.jsonl:5", {"question": "red", "answer": ""}),
    ]
    report = json.loads((run / "report.json").read_text())
    assert report["held_out_rows"] == 1
    assert report["training_rows"] in (11 * 2 + 12, 12 * 2 + 11)
    assert report["repeated_rows"] == 0, "what a weight repeats is no repetition"
    with (sources / "mix.yaml").open("a") as file:
        file.write("# another mixture")
    resumed = ("train", "--resume", "--out", str(run), "--steps", "3")
    assert main(resumed) == 1
    assert "is not the data that the run was begun with" in capfd.readouterr().err


def test_columns_are_named_where_data_is_trained_scored_and_shown(tiny_base, sources, capfd):
    data = ("--data", str(sources / "table.csv"))
    assert _train(tiny_base, sources, *data) == 1
    told = capfd.readouterr().err
    columns = "--columns prompt=mine completion=yours"
    assert f"as in {columns}, or --columns text=COLUMN" in " ".join(told.split())
    assert _train(tiny_base, sources, *data, *columns.split()) == 0
    run = str(sources / "run")
    assert main(("eval", run, *data, "--max-length", "32", *columns.split(), "--json")) == 0
    assert main(("data", str(tiny_base), data[1], *columns.split())) == 0
    assert "12" in capfd.readouterr().out
    wrong = ("prompt=mime", "completion=yours")
    assert main(("data", str(tiny_base), data[1], "--columns", *wrong)) == 1
    assert "no column 'mime'; did you mean 'mine'?" in " ".join(capfd.readouterr().err.split())
