"""The README's Python example is run as it stands, with a model and data put in its place."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_python_example_runs(tiny_base: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(block.strip().splitlines()) <= 15
    shutil.copytree(tiny_base, tmp_path / "path" / "to" / "model")
    row = {"prompt": "red lamp", "completion": "the lamp"}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 20, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    steps = re.search(r"steps=\d+", block)
    assert steps is not None
    names: dict[str, object] = {}
    exec(block.replace(steps.group(), "steps=2"), names)
    assert "->" in capsys.readouterr().out
    assert (tmp_path / "model.gguf").stat().st_size > 10_000
    assert (tmp_path / "merged" / "merge-report.json").is_file()


def test_the_commands_in_the_readme_exist() -> None:
    from graft.cli.commands import COMMANDS

    blocks = re.findall(r"```\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    commands = re.findall(r"^graft +(\w+)", "\n".join(blocks), re.MULTILINE)
    assert len(set(commands)) >= 6
    assert set(commands) <= set(COMMANDS)


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_make_targets_in_the_readme_exist(target: str) -> None:
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    assert f"make {target}" in README.read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, re.MULTILINE)
