"""kill -9 at any file operation: the next call works, and all is as if nothing had happened.

benchmarks/reliability.py kill does this at random operations of all commands.
"""

from __future__ import annotations

import pytest

from faults.campaigns import kill
from faults.record import Kind
from faults.scenarios import Bench
from faults.shim import Action

PLACES = {
    "when its folder is made": (Kind.MKDIR, "/run", Action.TEAR),
    "before its configuration is there": (Kind.RENAME, "/config.yaml", Action.KILL),
    "in the first line of the metrics": (Kind.WRITE, "/metrics.jsonl", Action.TEAR),
    "in the first checkpoint": (Kind.WRITE, "/.step-00000002", Action.TEAR),
    "before the second checkpoint has its name": (Kind.RENAME, "/step-00000004", Action.KILL),
    "while an old checkpoint goes": (Kind.UNLINK, "checkpoints/", Action.TEAR),
    "in the adapter": (Kind.WRITE, "adapter", Action.TEAR),
    "at the end": (Kind.RENAME, "/report.md", Action.KILL),
}


@pytest.fixture(scope="module")
def training(bench: Bench):
    return bench.training("merge_aware that rounds between steps")


def number_of(bench: Bench, scenario, kind: Kind, name: str) -> int:
    """Return the number of the first such operation on such a file."""
    return next(
        operation.number
        for operation in bench.reference(scenario).record
        if operation.kind == kind and name in (operation.other or operation.path)
    )


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_training_goes_on_or_begins_anew_and_ends_the_same(place, bench, training) -> None:
    kind, name, action = PLACES[place]
    found = kill(bench, training, number_of(bench, training, kind, name), action)
    assert found.good, found


def test_a_training_that_draws_random_numbers_goes_on_with_them(bench) -> None:
    training = bench.training("lora with dropout")
    place = number_of(bench, training, Kind.RENAME, "/adapter")
    assert kill(bench, training, place, Action.KILL).word == "identical"


@pytest.mark.parametrize("name", ["quantize", "export gguf"])
def test_a_killed_command_can_be_called_again(name, bench) -> None:
    scenario = bench.scenario(name)
    last = bench.reference(scenario).record[-1].number
    for at, action in ((last // 2, Action.TEAR), (last, Action.KILL)):
        found = kill(bench, scenario, at, action)
        assert found.good, found
