"""Scores of generated texts against values worked out by hand."""

from __future__ import annotations

import pytest

from graft.errors import GraftError
from graft.evaluate.scores import (
    attribute_coverage,
    attributes,
    missing_scorers,
    score_texts,
    share_mentioned,
    why_no_scorers,
)

SHEET = "name: Bel Arc | category: desk lamp | colour: green | material: oak | weight: 1.5 kg"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Bel Arc is a green oak desk lamp that weighs 1.5 kg.", 5 / 5),
        ("the BEL ARC is a Green OAK Desk Lamp of 1.5 KG", 5 / 5),
        ("The Bel Arc is a desk lamp.", 2 / 5),
        ("The Bel  Arc is a lamp for a desk.", 0 / 5),
        ("evergreen, greenish, oaken, soak, oak-like, 11.5 kg, 1.5 kgs", 1 / 5),
        ("", 0.0),
    ],
)
def test_share_mentioned_on_known_truths(text: str, expected: float) -> None:
    assert share_mentioned(SHEET, text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "text", "found"),
    [
        ("5 kg", "it weighs 1.5 kg", False),
        ("5 kg", "it weighs 5 kg.", True),
        ("$45", "priced at $45.", True),
        ("$45", "priced at $45.50", False),
        ("$45", "priced at $450", False),
        ("a.c", "abc", False),
    ],
)
def test_a_value_counts_only_as_whole_words(value: str, text: str, found: bool) -> None:
    assert share_mentioned(f"x: {value} | y: never", text) == float(found) / 2


@pytest.mark.parametrize(
    ("prompt", "values"),
    [
        ("name: Bel Arc | category: lamp | price: $45\n", ["Bel Arc", "lamp", "$45"]),
        ("name: Bel Arc\ntime: 10:30\n\n", ["Bel Arc", "10:30"]),
        ("name[The Eagle], eatType[pub, bar], area[city]", ["The Eagle", "pub, bar", "city"]),
        ("name : The Eagle | near : Café X", ["The Eagle", "Café X"]),
        ("name: Bel Arc | no colon", []),
        ("Question: what is it?", []),
        ("name[The Eagle]", []),
        ("name[The Eagle], and more]", []),
        ("Describe the lamp.", []),
        ("", []),
    ],
)
def test_attributes_are_the_values_of_a_list_of_fields(prompt: str, values: list[str]) -> None:
    assert attributes(prompt) == values


def test_coverage_is_the_mean_over_the_prompts_that_list_attributes() -> None:
    prompts = ["a: red | b: lamp", "just words", "a: oak | b: steel"]
    assert attribute_coverage(prompts, ["a red lamp", "red", "steel only"]) == (1.0 + 0.5) / 2
    assert attribute_coverage(["just words"], ["red"]) is None


def test_scores_against_hand_computed_values() -> None:
    prompts = ["x: cat | y: mat", "x: dog | y: log"]
    references = ["the cat sat on a mat", " a dog"]
    one = score_texts(prompts[:1], ["the cat sat on the mat"], references[:1])
    # 1-grams 5/6 (the second 'the' is in excess), 2-grams 3/5, 3-grams 2/4, 4-grams 1/3; no brevity
    # penalty. The longest common subsequence has 5 of 6 words on either side.
    assert one.bleu == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert one.rouge_l == pytest.approx(5 / 6)
    assert one.exact_match == 0.0
    both = score_texts(prompts, ["the cat sat on the mat", "a dog\n"], references)
    assert both.exact_match == 0.5
    assert both.rouge_l == pytest.approx((5 / 6 + 1) / 2)
    assert both.coverage == pytest.approx((1 + 1 / 2) / 2)
    assert both.texts == 2
    with pytest.raises(GraftError, match="no texts"):
        score_texts([], [], [])


def test_scorers_that_are_not_installed_are_named_and_gone_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import graft.evaluate.scores as scores

    monkeypatch.setattr(scores, "find_spec", lambda name: None if name == "rouge_score" else 1)
    assert missing_scorers() == ["rouge-score"]
    assert "need rouge-score, " in why_no_scorers() and "graft-llm[eval]" in why_no_scorers()
    found = score_texts(["a: red | b: lamp"], ["a red lamp"], ["a red lamp "])
    assert (found.exact_match, found.coverage) == (1.0, 1.0)
    assert found.bleu is None and found.rouge_l is None
