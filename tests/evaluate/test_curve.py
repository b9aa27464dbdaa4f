"""The picture of what several sizes of a model cost."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from graft.evaluate.curve import plot_curve


@pytest.mark.parametrize(("perplexity", "labels"), [(None, ["error"]), (3.5, ["perp", "error"])])
def test_what_was_not_measured_has_no_axes_and_the_title_fits(
    perplexity: float | None, labels: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    points = [("small", 1.0, perplexity, 0.5), ("large", 2.0, perplexity, 0.25)]
    plot_curve({"factors": points}, [], tmp_path / "curve.png", "a long title, " * 12)
    (figure,) = drawn
    found = figure.axes
    assert [one.get_ylabel()[: len(label)] for one, label in zip(found, labels, strict=True)] == (
        labels
    )
    assert len(found[0].get_title().splitlines()) == 2
