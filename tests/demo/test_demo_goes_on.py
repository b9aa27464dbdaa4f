import pytest

from graft.demo import run as demo
from graft.demo.run import run_demo
from graft.errors import GraftError


def test_a_demo_that_was_stopped_goes_on(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(demo, "_SAMPLED_ROWS", 1)
    monkeypatch.setattr(demo, "_MAX_NEW_TOKENS", 2)
    merge = demo.merge

    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "merge", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path / "out", steps=2)
    monkeypatch.setattr(demo, "merge", merge)
    monkeypatch.setattr(demo, "quantize", stopped)  # what is there is not made again
    result = run_demo(tmp_path / "out", steps=2)
    assert all(file.exists() for file in result.files.values())
    with pytest.raises(GraftError, match="out exists already"):
        run_demo(tmp_path / "out", steps=2)


def test_a_folder_of_other_things_is_left_alone(tmp_path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(GraftError, match="exists already"):
        run_demo(tmp_path, steps=2)
