"""--activations reaches the model: one without integers is refused."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from graft.cli.main import main
from graft.kernels.backend.native_library import why_unavailable

pytestmark = pytest.mark.skipif(
    why_unavailable() is not None, reason=f"native backend: {why_unavailable()}"
)


def test_a_model_of_floats_is_refused(
    tiny_base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the lamp\n"))
    for words in (["generate", str(tiny_base), "--prompt", "the"], ["chat", str(tiny_base)]):
        assert main([*words, "--activations", "q8"]) == 1
        assert "--activations q8 is for weights that are integers" in capsys.readouterr().err


def test_a_model_of_integers_is_continued(tiny_base: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "int4")
    assert main(["quantize", "--model", str(tiny_base), "--out", folder, "--format", "int"]) == 0
    words = ["generate", folder, "--prompt", "the lamp", "--max-new-tokens", "4"]
    assert main([*words, "--activations", "q8"]) == 0
