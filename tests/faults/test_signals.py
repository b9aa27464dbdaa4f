"""SIGINT, SIGTERM and SIGHUP: a training ends soon, with a checkpoint, and says how to go on.

benchmarks/reliability.py signals does this at random moments, of time and of file operations.
"""

from __future__ import annotations

import pytest

from faults.campaigns import SIGNALS, interrupt
from faults.record import Kind
from faults.scenarios import Bench


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_training_saves_where_it_is_and_goes_on(number, bench: Bench) -> None:
    training = bench.training("lora with dropout", save_every=None)
    lines = [
        operation.number
        for operation in bench.reference(training).record
        if operation.kind == Kind.WRITE and operation.path.endswith("/metrics.jsonl")
    ]
    found = interrupt(bench, training, number, lines[3])
    assert found.good, found
    assert found.word == "identical", "it goes on from the checkpoint"


def test_before_its_first_step_there_is_nothing_to_save(bench: Bench) -> None:
    training = bench.training("lora with dropout", save_every=None)
    found = interrupt(bench, training, SIGNALS[1], at=2)
    assert found.good, found
