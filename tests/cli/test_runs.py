"""`graft runs`: what lies below a folder, damaged or not, and how runs differ."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from graft.api.runs import list_runs
from graft.cli.main import main
from graft.errors import GraftError
from graft.files.lock import is_owned, owned

BEGUN = Path(__file__).resolve().parents[1] / "fixtures" / "a5f4af3" / "runs"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three runs at two depths, and what is no run."""
    shutil.copytree(BEGUN / "lora" / "begun", tmp_path / "first")
    shutil.copytree(BEGUN / "qalora" / "begun", tmp_path / "more" / "second")
    shutil.copytree(BEGUN / "lora" / "begun", tmp_path / "more" / "deep" / "third")
    shutil.copytree(BEGUN / "lora" / "begun", tmp_path / ".hidden.part" / "fourth")
    (tmp_path / "empty").mkdir()
    return tmp_path


def evaluate(run: Path, *losses: tuple[int, float]) -> None:
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for step, loss in losses:
            file.write(json.dumps({"step": step, "eval_loss": loss}) + "\n")


def test_runs_are_found_two_levels_below(folder: Path) -> None:
    found = list_runs([folder])
    assert [Path(run.name).name for run in found] == ["first", "second"]
    first = found[0]
    assert (first.status, first.method, first.steps_done, first.steps) == (
        *("unfinished", "lora"),
        *(4, 6),
    )
    assert first.loss_before is not None and first.loss is None
    assert first.seconds is not None and first.memory_bytes is not None
    assert [Path(run.name).name for run in list_runs([folder / "more", folder / "first"])] == [
        *("first", "third", "second"),
    ]


def test_a_finished_run_has_the_times_of_its_report(folder: Path) -> None:
    evaluate(folder / "first", (4, 1.5), (6, 1.75))
    drift = {"kl": 0.25}
    report = {"seconds": 75.0, "peak_memory_bytes": 3 * 2**20, "eval_loss": 1.5, "drift": drift}
    (folder / "first" / "report.json").write_text(json.dumps(report), encoding="utf-8")
    (run,) = list_runs([folder / "first"])
    assert run.status == "finished" and run.seconds == 75 and run.memory_bytes == 3 * 2**20
    assert (run.loss, run.best_loss, run.best_step, run.drift) == (1.5, 1.5, 4, 0.25)


def status(run: Path, state: str, **more: object) -> None:
    found = {"state": state, "step": 4, "steps": 6, "since": "2026-01-02T03:04:05+00:00", **more}
    (run / "status.json").write_text(json.dumps(found), encoding="utf-8")


def test_a_run_is_what_its_status_says(folder: Path, capsys) -> None:
    run = folder / "first"
    part = {"since": "2026-01-02T03:04:05+00:00", "seconds": 7.5, "first_step": 1, "last_step": 4}
    for state in ("interrupted", "finished"):
        status(run, state, parts=[part])
        assert list_runs([run])[0].status == state
    status(run, "running", parts=[part, part])
    (found,) = list_runs([run])
    assert found.status == "killed" and found.seconds == 15
    with owned(run):
        assert is_owned(run) and list_runs([run])[0].status == "running"
    assert not is_owned(run)
    status(run, "failed", error="no \x1b[2J space")
    assert main(["runs", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "failed" in printed and "no \\x1b[2J space" in printed


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.yaml", b"model: [1, 2"),
        ("config.yaml", b"\xff\xfe"),
        ("config.yaml", b"model: base\n"),
        ("config.yaml", b"model: base\ndata: rows\nout: here\nsteps: many\n"),
        ("report.json", b"[]"),
        ("status.json", b'{"state": "asleep"}'),
    ],
)
def test_a_damaged_run_is_a_row_that_says_so(file, content, folder, capsys) -> None:
    (folder / "first" / file).write_bytes(content)
    assert main(["runs", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "damaged" in printed and "unfinished" in printed
    assert f"first/{file}" in printed.replace("\n", "")


@pytest.mark.parametrize(
    "line",
    ['{"step": 5, "loss": ', "[[[[", "7", "\udcff", '{"loss": 1}', '{"step": "5", "loss": 1}'],
)
def test_metrics_are_read_up_to_a_line_that_is_none(line: str, folder: Path) -> None:
    with (folder / "first" / "metrics.jsonl").open("a", errors="surrogateescape") as file:
        file.write(f"{line}\n" + json.dumps({"step": 6, "loss": 1.0}) + "\n")
    (run,) = list_runs([folder / "first"])
    assert run.steps_done == 4 and run.status == "unfinished"


def test_rows_are_sorted_and_those_without_a_figure_are_last(folder: Path, capsys) -> None:
    evaluate(folder / "more" / "second", (2, 0.5))
    (folder / "first" / "metrics.jsonl").unlink()
    shutil.copytree(BEGUN / "dora" / "begun", folder / "zeroth")
    names = [Path(run.name).name for run in list_runs([folder], "loss")]
    assert names == ["second", "zeroth", "first"]
    assert main(["runs", str(folder), "--sort", "loss", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["runs"]
    assert [Path(row["name"]).name for row in rows] == names


def test_named_runs_are_compared(folder: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    assert main(["runs", "first", "more/second", "--json"]) == 0
    differing = json.loads(capsys.readouterr().out)["differing_settings"]
    assert differing["method"] == ["lora", "qalora"] and "out" not in differing
    assert "batch_size" not in differing
    assert main(["runs", "first", "more/second"]) == 0
    printed = capsys.readouterr().out
    assert "settings that differ" in printed and "qalora" in printed and "batch-size" not in printed
    assert main(["runs", "first", "more"]) == 0
    assert "settings that differ" not in capsys.readouterr().out, "one of them is no run"


def test_nothing_from_a_file_acts_on_the_terminal(folder: Path, capsys) -> None:
    config = (folder / "first" / "config.yaml").read_text(encoding="utf-8")
    lines = [
        'data: "a\\e[2J[bold]b"' if line[:5] == "data:" else line for line in config.split("\n")
    ]
    (folder / "first" / "config.yaml").write_text("\n".join(lines), encoding="utf-8")
    assert main(["runs", str(folder / "first")]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\\x1b[2J[bold]b" in printed


def test_folders_that_hold_none_or_are_none(tmp_path: Path, capsys) -> None:
    assert main(["runs", str(tmp_path)]) == 0
    assert "no runs here" in capsys.readouterr().out
    with pytest.raises(GraftError, match="there is no folder .*nowhere"):
        list_runs([tmp_path / "nowhere"])


def test_listing_imports_no_torch(folder: Path) -> None:
    code = (
        "import sys; from graft.cli.main import main; "
        f"main(['runs', {str(folder)!r}]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
