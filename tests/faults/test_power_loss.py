"""Power lost at any moment: the run resumes from what was flushed, or begins anew.

benchmarks/reliability.py power does this a hundred times; disk.py says what a loss may take.
"""

from __future__ import annotations

import pytest

from faults.campaigns import power
from faults.disk import Loss
from faults.scenarios import Bench

NAME = "merge_aware that rounds between steps"


@pytest.mark.parametrize(
    ("share", "loss"), [(0.05, Loss.CHANCE), *((0.55, loss) for loss in Loss), (0.9, Loss.CHANCE)]
)
def test_a_training_resumes_after_a_power_loss(share, loss, bench: Bench) -> None:
    training = bench.training(NAME)
    after = int(len(bench.reference(training).record) * share)
    found = power(bench, training, after, loss, seed=1)
    assert found.good, found


@pytest.mark.parametrize("loss", [Loss.NOTHING, Loss.NAMES], ids=["nothing", "names"])
@pytest.mark.parametrize("name", ["train " + NAME, "export gguf"])
def test_what_a_command_has_written_is_there_after_a_power_loss(name, loss, bench: Bench) -> None:
    scenario = bench.scenario(name)
    found = power(bench, scenario, len(bench.reference(scenario).record), loss, seed=1)
    assert found.good, found
