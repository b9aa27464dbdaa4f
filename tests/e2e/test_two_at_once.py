"""Commands side by side: each writes its own, and two that want one place are told so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from graft.cli.main import main
from graft.files.write import scratch_folder

TRAIN = ["--method", "qalora", "--steps", "2", "--batch-size", "2", "--max-length", "32"]


@pytest.fixture(scope="module")
def run(tiny_base, rows, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("two") / "run"
    words = ["train", "--model", str(tiny_base), "--data", str(rows), *TRAIN]
    assert main([*words, "--out", str(out)]) == 0
    return out


@pytest.fixture
def commands(run, tiny_base) -> dict[str, list[str]]:
    return {
        "quantize": ["quantize", "--model", str(tiny_base), "--format", "int"],
        "merge": ["merge", str(run)],
        "export": ["export", str(run), "--to", "gguf"],
    }


@pytest.mark.parametrize("name", ["quantize", "merge", "export"])
def test_what_another_process_is_writing_is_left_to_it(name, commands, tmp_path, capsys) -> None:
    words = [*commands[name], "--out"]
    with scratch_folder(tmp_path / "out") as part:
        (part / "half").write_text("")
        assert main([*words, str(tmp_path / "out")]) == 1
        assert "out is being written by another process" in capsys.readouterr().err
        assert main([*words, str(tmp_path / "other")]) == 0
        assert (part / "half").exists()
    assert main([*words, str(tmp_path / "out")]) == 0
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


def test_commands_on_one_run_side_by_side(commands, tmp_path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    wanted = {
        "a.gguf": commands["export"],
        "b.gguf": commands["export"],
        "merged": commands["merge"],
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "graft.cli.main", *words, "--out", str(tmp_path / name)],
            env=environment,
            stderr=subprocess.PIPE,
        )
        for name, words in wanted.items()
    ]
    for process in started:
        _, error = process.communicate()
        assert process.returncode == 0, error
    assert (tmp_path / "a.gguf").stat().st_size == (tmp_path / "b.gguf").stat().st_size
    assert (tmp_path / "merged" / "merge-report.json").is_file()
    cards = {f"{name}.md" for name in wanted if name.endswith(".gguf")}
    assert {path.name for path in tmp_path.iterdir()} == {*wanted, *cards}
