"""Runs that nothing interrupted, and that something did."""

from __future__ import annotations

from pathlib import Path

import pytest
from resuming import killed_after, settings

import graft


@pytest.fixture(scope="module")
def whole(tiny_base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    graft.finetune(settings(tiny_base, rows, run))
    return run


@pytest.fixture
def broken(whole: Path, tiny_base: Path, rows: Path, tmp_path: Path) -> Path:
    """The same run, killed after step 5: it has checkpoints of steps 2 and 4."""
    run = tmp_path / "run"
    killed_after(5, settings(tiny_base, rows, run))
    return run
