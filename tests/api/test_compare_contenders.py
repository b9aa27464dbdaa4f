"""The words that name contenders, and what they are trained and deployed as."""

from __future__ import annotations

import pytest

from graft.comparison.contenders import (
    Contender,
    entries,
    learning_rates,
    parse_contenders,
    trainings,
)
from graft.errors import GraftError


def test_words_name_contenders() -> None:
    words = ["base", "lora", "lora+gptq", "qlora+rtn", "qalora@gptq", "merge_aware@qep"]
    assert parse_contenders(words) == [
        Contender("base"),
        Contender("lora"),
        Contender("lora", solver="gptq"),
        Contender("qlora", solver="rtn"),
        Contender("qalora", base_solver="gptq"),
        Contender("merge_aware"),
    ]
    assert [one.name for one in parse_contenders(words)] == [*words[:-1], "merge_aware"]


def test_every_word_that_names_no_contender_is_told_at_once() -> None:
    words = ["lorra", "lora+gtpq", "qalora+rtn", "lora@gptq", "base@rtn", "+rtn", "lora"]
    with pytest.raises(GraftError) as told:
        parse_contenders(words)
    message = str(told.value)
    assert "6 problems" in message
    for piece in ("did you mean 'lora'", "did you mean 'gptq'", "qalora@rtn", "drop @gptq"):
        assert piece in message


def test_one_training_serves_all_that_deploy_it() -> None:
    words = ["base", "base+rtn", "lora", "lora+rtn", "lora+gptq", "qlora+gptq", "qalora"]
    wanted = entries(parse_contenders([*words, "qalora@gptq"]), [4, 2], seeds=2)
    names = [training.name for training in trainings(wanted)]
    assert sorted(names) == sorted(
        f"{run}-seed{seed}"
        for run in ("lora", "qlora", "qalora-4bit", "qalora-2bit", "qalora@gptq-4bit")
        + ("qalora@gptq-2bit",)
        for seed in (0, 1)
    )
    # Untrained models have no seed, dense ones no width.
    assert len(wanted) == 1 + 2 + 2 + 4 + 4 + 4 + 4 + 4
    assert len({entry.name for entry in wanted}) == len(wanted)


def test_learning_rates_are_by_method() -> None:
    assert learning_rates(["lora=1e-3", "affine=0.05"]) == {"lora": 1e-3, "affine": 0.05}
    with pytest.raises(GraftError, match="4 problems"):
        learning_rates(["lora", "laro=1", "lora=0", "affine=nan"])


# Whole comparisons --------------------------------------------------------------------------------
