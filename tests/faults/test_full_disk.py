"""A disk that is full or fails: a clear message, nothing half-written, and then all goes on.

benchmarks/reliability.py full does this at random operations of all commands.
"""

from __future__ import annotations

import errno
from itertools import cycle

import pytest

from faults.campaigns import ERRORS, fail
from faults.scenarios import Bench


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_a_training_says_so_keeps_its_checkpoint_and_goes_on(number, bench: Bench) -> None:
    training = bench.training("merge_aware that rounds between steps")
    total = bench.reference(training).operations
    share = {number: index for index, number in enumerate(ERRORS)}[number]
    found = fail(bench, training, total * (2 * share + 1) // 10, number)
    assert found.good, found


@pytest.mark.parametrize("name", ["merge lora", "export gguf"])
def test_a_command_says_so_and_works_when_there_is_room(name, bench: Bench) -> None:
    scenario = bench.scenario(name)
    total = bench.reference(scenario).operations
    places = (2, total // 2, total - 2)
    for at, number in zip(places, cycle((errno.ENOSPC, errno.EROFS, errno.EMFILE)), strict=False):
        found = fail(bench, scenario, at, number)
        assert found.good, found
