"""Settings that no training could have are refused together, each in one line."""

from __future__ import annotations

import math

import pytest

from graft.api.checks import check_train_config
from graft.api.config import TrainConfig
from graft.api.evaluate import evaluate_model
from graft.errors import GraftError, Problems, nearest, raise_problems

NEEDED = {"model": "m", "data": "d", "out": "o"}


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("name", ["learning_rate", "epochs", "weight_decay", "min_improvement"])
def test_a_number_that_is_none_is_refused(name: str, value: float) -> None:
    with pytest.raises(GraftError, match=f"--{name.replace('_', '-')} is {value}; expected a num"):
        check_train_config(TrainConfig(**NEEDED, **{name: value}))


def test_infinity_means_never_where_there_is_a_never() -> None:
    check_train_config(TrainConfig(**NEEDED, max_grad_norm=math.inf, save_minutes=math.inf))
    with pytest.raises(GraftError, match="--max-grad-norm is nan"):
        check_train_config(TrainConfig(**NEEDED, max_grad_norm=math.nan))


def test_counts_begin_with_one() -> None:
    with pytest.raises(GraftError) as error:
        check_train_config(TrainConfig(**NEEDED, calibration_rows=0, damping=-1.0))
    assert "--calibration-rows is 0" in str(error.value) and "--damping is -1.0" in str(error.value)
    with pytest.raises(GraftError, match="--batch-size is 0; expected more than 0"):
        evaluate_model("m", "d", batch_size=0)


def test_a_name_is_near_whatever_its_case() -> None:
    assert nearest("LoRA", ["affine", "lora", "qalora"]) == "lora"
    assert nearest("q_Proj", ["Q_proj", "o_norm"]) == "Q_proj"
    assert nearest("xyz", ["lora"]) is None


def test_problems_of_a_problem_stand_below_it() -> None:
    problems = Problems()
    with problems.collecting():
        raise_problems(["a", "b"], "settings")
    with problems.collecting():
        raise GraftError("c")
    with pytest.raises(GraftError) as error:
        problems.raise_all("nothing was started")
    assert str(error.value).splitlines() == [
        "nothing was started: 2 problems",
        "  - settings: 2 problems",
        "    - a",
        "    - b",
        "  - c",
    ]
