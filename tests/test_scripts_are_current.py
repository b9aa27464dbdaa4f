"""What benchmarks and scripts import of graft is there: tests run few of them, as they are slow."""

from __future__ import annotations

import ast
import importlib
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("scripts/*.py")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_name_that_it_imports_exists(script: Path) -> None:
    missing = []
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "graft":
            assert node.module is not None
            module = importlib.import_module(node.module)
            missing += [
                f"{node.module}.{name.name}"
                for name in node.names
                if not hasattr(module, name.name) and not find_spec(f"{node.module}.{name.name}")
            ]
    assert missing == []


@pytest.mark.parametrize("page", ["SECURITY.md", "docs/reliability.md", "ARCHITECTURE.md"])
def test_every_test_that_a_page_names_exists(page: str) -> None:
    named = set(
        re.findall(r"`(tests/[\w/.]+|benchmarks/[\w/.]+)`", (ROOT / page).read_text("utf-8"))
    )
    assert named, "it names what holds its promises"
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) > 10
