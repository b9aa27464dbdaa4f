"""Mean, spread and paired ratio by hand; the page escapes whatever it is given."""

from __future__ import annotations

import math

import pytest

from graft.comparison.charts import Point, bars, scatter
from graft.comparison.page import PageContent, render_page
from graft.comparison.prepare import Prompt
from graft.comparison.results import Result, Spread, row_as_dict, summarise, training_rows


def result(contender: str, seed: int | None, perplexity: float | None, **more: object) -> Result:
    error = None if perplexity is not None else "it <broke>"
    return Result(
        contender=contender,
        bits=more.pop("bits", None),  # type: ignore[arg-type]
        seed=seed,
        perplexity=perplexity,
        error=error,
        **more,  # type: ignore[arg-type]
    )


def test_mean_and_sample_standard_deviation() -> None:
    spread = Spread.over([2.0, None, 4.0, 9.0])
    assert spread is not None
    assert spread.mean == 5.0
    assert spread.spread == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    assert spread.count == 3
    assert Spread.over([7.0]) == Spread(7.0, None, 1)
    assert Spread.over([None]) is None


def test_ratios_are_paired_by_seed() -> None:
    rows = summarise(
        [
            result("base", None, 20.0),
            result("lora", 0, 2.0),
            result("lora", 1, 4.0),
            result("qalora", 0, 3.0, bits=4),
            result("qalora", 1, 5.0, bits=4),
            result("qalora", 0, None, bits=2),
            result("qalora", 1, 6.0, bits=2),
        ]
    )
    base, lora, four, two = rows
    assert base.ratios == {0: 10.0, 1: 5.0}, "an untrained model is paired with every seed"
    assert lora.ratios == {0: 1.0, 1: 1.0}
    assert four.ratios == {0: 1.5, 1: 1.25}
    assert four.ratio is not None
    assert four.ratio.mean == 1.375, "the mean of ratios, not the ratio of means (8 / 6)"
    assert four.ratio.spread == pytest.approx(0.25 / math.sqrt(2))
    assert two.ratios == {1: 1.5} and two.mean("perplexity") == 6.0
    assert two.errors == ("it <broke>",)
    plain = row_as_dict(four)
    assert plain["perplexity"] == {"mean": 4.0, "spread": pytest.approx(math.sqrt(2)), "count": 2}
    assert plain["perplexity_ratio"]["by_seed"] == {0: 1.5, 1: 1.25}


def test_without_the_yardstick_there_are_no_ratios() -> None:
    (row,) = summarise([result("qalora", 0, 3.0, bits=4)])
    assert row.ratios == {} and row.ratio is None
    assert row_as_dict(row)["perplexity_ratio"] is None


def test_each_training_is_counted_once_however_often_it_is_deployed() -> None:
    costs = {"training_seconds": 10.0, "run": "lora-seed0"}
    rows = training_rows(
        [
            result("base", None, 9.0),
            result("lora+rtn", 0, 2.0, bits=4, **costs),
            result("lora+rtn", 0, 2.0, bits=2, **costs),
            result("lora+rtn", 1, 2.0, bits=4, training_seconds=20.0, run="lora-seed1"),
            result("affine", 0, 2.0, bits=3, training_seconds=5.0, run="affine-3bit-seed0"),
        ]
    )
    assert [(row.label, row.mean("training_seconds")) for row in rows] == [
        ("lora", 15.0),
        ("affine, 3 bits", 5.0),
    ]


NASTY = "<script>alert('x')</script>&\"<img src=x onerror=y>"


def test_the_page_escapes_every_text_that_it_is_given() -> None:
    good = result("lora", 0, 2.0, run=NASTY, file_bytes=9, training_seconds=1.0, texts=(NASTY,))
    bad = Result(contender=NASTY, bits=None, seed=0, error=NASTY)
    other = result(NASTY, 1, 2.1, file_bytes=9)
    results = [good, bad, other]
    page = render_page(
        PageContent(
            settings={"model": f"/a/{NASTY}", "data": NASTY, "batch_size": 1, NASTY: NASTY},
            about={"versions": {NASTY: NASTY}, "training_rows": 1, "held_out_rows": 1, "steps": 1},
            results=results,
            rows=summarise(results),
            curves={NASTY: [{"step": 0, "eval_loss": 2.0}, {"step": 1, "loss": 1.0}]},
            prompts=[Prompt(NASTY, [1], NASTY)],
        )
    )
    assert "<script" not in page and "<img" not in page and 'onerror=y>"' not in page
    assert page.count("&lt;img src=x onerror=y&gt;") >= 12
    assert "http" not in page


def test_charts_stand_values_of_one_size_and_none() -> None:
    same = [Point(1.0, 2.0, "a"), Point(1.0, 2.0, "b")]
    chart = scatter(same, "x", "y")
    assert chart.count("<circle") == 2 and "nan" not in chart
    assert "nan" not in bars([("a", 0.0, "0")], "t")


def test_bars_are_as_long_as_their_values() -> None:
    chart = bars([("a", 1.0, "one"), ("b", 4.0, "four")], "t")
    lengths = [float(part.split('width="')[1].split('"')[0]) for part in chart.split("<rect")[1:]]
    assert lengths[1] / lengths[0] == pytest.approx(4, rel=0.01)
