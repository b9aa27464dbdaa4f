"""The rounds of each campaign: befall a command with a fault, call it again, say what came of it.

A round's words, which the tables count:

- identical: the next call went on, and all that it left is that of an uninterrupted run
- begun anew and identical: the same, where there was no checkpoint to go on from
- complete already: the next call refused to write over a whole result; nothing else was left
- complete already, leftovers: the same, and temporary files stay beside it
- refused: neither the same call with --resume nor the same call without it works
- differing: the next call succeeded and something is missing or not as in an uninterrupted run
- leftovers: it succeeded and all is right, but there is more than an uninterrupted run leaves
- unreadable: a file under its final name is not whole after the fault
- silently incomplete: an error befell a command that ended with success all the same
- lost after success: what a command said that it had written did not survive a power loss
- checkpoint lost: there was a checkpoint, the next call did not go on from it
- traceback, hangs, dies: the next call ended so
"""

from __future__ import annotations

import errno
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from faults.disk import Disk, Loss, state_after
from faults.outcomes import (
    Contents,
    contents,
    differences,
    half_written,
    last_step,
    leftovers,
    whole_checkpoints,
)
from faults.record import checkpoints_before
from faults.scenarios import STEPS, Bench, Reference, Scenario
from faults.shim import Action
from faults.warm import Outcome

GOOD = ("identical", "begun anew and identical", "complete already", "untouched")
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EMFILE, errno.EDQUOT)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PROMPT_SECONDS = 5.0
"""In which a command has to end after a signal."""


@dataclass(frozen=True)
class Round:
    """What came of one round."""

    scenario: str
    fault: str
    place: str
    """The operation at which it came, by its number, of how many."""
    word: str
    message: str = ""
    """How the command that was befallen ended, where it could say something."""
    details: Sequence[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return self.word in GOOD and self.message in ("", "clear", "finished")


# The next call --------------------------------------------------------------------------------


def next_call(
    bench: Bench, scenario: Scenario, reference: Reference, words: Sequence[object] | None = None
) -> tuple[str, list[str]]:
    """Call the command again and return a word for what came of it, and details."""
    expected = reference.contents
    before = contents(bench.box)
    had_checkpoint = bool(whole_checkpoints(before))
    first = bench.run(words or scenario.resuming)
    outcome = first
    if _refused(first) and scenario.trains:
        outcome = bench.run(scenario.words)
    found = contents(bench.box)
    wrong, more = differences(found, expected), leftovers(found, expected)
    if outcome.timed_out:
        return "hangs", []
    if outcome.status < 0:
        return "dies", [f"signal {-outcome.status}"]
    if "Traceback" in outcome.output:
        return "traceback", [outcome.error]
    if outcome.status != 0:
        if not wrong and not scenario.trains:
            return ("complete already, leftovers", more) if more else ("complete already", [])
        lines = [first.error] if outcome is first else [first.error, outcome.error]
        return "refused", [*lines, *more]
    if wrong:
        return "differing", wrong
    if more:
        return "leftovers", more
    if had_checkpoint and scenario.trains and (outcome is not first or "anew" in first.output):
        return "checkpoint lost", [first.error]
    if scenario.trains and not had_checkpoint:
        return "begun anew and identical", []
    return "identical", []


def _refused(outcome: Outcome) -> bool:
    return outcome.status > 0 and "Traceback" not in outcome.output and not outcome.timed_out


# kill -9 ------------------------------------------------------------------------------------------


def kill(bench: Bench, scenario: Scenario, at: int, action: Action) -> Round:
    """Kill a command at an operation, before it or in its middle, and call it again."""
    reference = bench.reference(scenario)
    bench.empty()
    killed = bench.run(scenario.words, action, at=at)
    if killed.status != -signal.SIGKILL:
        raise RuntimeError(f"{scenario.name} was not killed at {at}: {killed}")
    broken = half_written(contents(bench.box), reference.contents)
    word, details = next_call(bench, scenario, reference)
    if broken:
        word, details = "unreadable", [*broken, f"then {word}", *details]
    return Round(scenario.name, action.name.lower(), _place(at, reference), word, "", details)


def _place(at: int, reference: Reference) -> str:
    last = [operation for operation in reference.record if operation.number <= at]
    what = str(last[-1]) if last else "the beginning"
    return f"{at} of {reference.operations}: {what}"


# Disk full and the like ---------------------------------------------------------------------------


def fail(bench: Bench, scenario: Scenario, at: int, number: int) -> Round:
    """Let an error befall everything from an operation on, then make room and call again."""
    reference = bench.reference(scenario)
    bench.empty()
    failed = bench.run(scenario.words, Action.FAIL, at=at, value=number)
    found = contents(bench.box)
    message = _how_it_failed(failed)
    broken = half_written(found, reference.contents)
    lost = _lost_checkpoint(found, reference, at)
    missing = differences(found, reference.contents)
    if failed.status == 0 and not missing:
        return Round(scenario.name, errno.errorcode[number], _place(at, reference), "untouched")
    word, details = next_call(bench, scenario, reference)
    if broken:
        word, details = "unreadable", [*broken, f"then {word}", *details]
    elif lost:
        word, details = "checkpoint lost", [lost, f"then {word}", *details]
    elif failed.status == 0:
        word, details = "silently incomplete", [*missing, f"then {word}", *details]
    if message not in ("clear", "finished"):
        details = [failed.error, *details]
    fault = errno.errorcode[number]
    return Round(scenario.name, fault, _place(at, reference), word, message, details)


def _how_it_failed(outcome: Outcome) -> str:
    """Return a word for how a command ended that met an error."""
    if outcome.timed_out:
        return "hangs"
    if "Traceback" in outcome.output:
        return "traceback"
    if outcome.status == 0:
        return "finished"
    if outcome.status == 1 and ": error: " in outcome.output:
        return "clear"
    return f"status {outcome.status}"


def _lost_checkpoint(found: Contents, reference: Reference, at: int) -> str | None:
    """Return the name of the newest checkpoint before operation `at`, if it is not there."""
    names = checkpoints_before(reference.record, at)
    there = whole_checkpoints(found)
    return names[-1] if names and names[-1] not in there else None


# Power loss ---------------------------------------------------------------------------------------


def power(bench: Bench, scenario: Scenario, after: int, loss: Loss, seed: int) -> Round:
    """Leave what a power loss after so many recorded operations leaves, and call it again."""
    reference = bench.reference(scenario)
    bench.empty()
    state = bench.work / "state"
    shutil.rmtree(state, ignore_errors=True)
    state.mkdir()
    state_after(Disk(bench.box), reference.record[:after], state, loss, seed)
    shutil.copytree(state, bench.box, symlinks=True, dirs_exist_ok=True)
    found = contents(bench.box)
    at = reference.record[after - 1].number
    ended = after == len(reference.record)
    gone = differences(found, reference.contents) if ended else []
    lost = _lost_checkpoint(found, reference, at + 1)
    word, details = next_call(bench, scenario, reference)
    if word in GOOD and gone:
        word, details = "lost after success", [*gone, f"then {word}"]
    elif word in GOOD and lost:
        word, details = "checkpoint lost", [lost, f"then {word}"]
    return Round(scenario.name, loss.value, _place(at, reference), word, "", details)


# Signals ------------------------------------------------------------------------------------------


def interrupt(
    bench: Bench, scenario: Scenario, number: int, at: int | None, seconds: float = 0.0
) -> Round:
    """Send a signal to a training, at an operation or after seconds; then go on with --resume."""
    reference = bench.reference(scenario)
    bench.empty()
    if at is None:
        place = f"{seconds:.2f} s"
        ended = bench.warm.run(scenario.words, signal_after=(number, seconds))
    else:
        place = _place(at, reference)
        ended = bench.run(scenario.words, Action.SIGNAL, at=at, value=number)
    found = contents(bench.box)
    name = signal.Signals(number).name
    if not differences(found, reference.contents):  # it came when all was written
        return Round(scenario.name, name, place, "untouched")
    message, details = _after_signal(ended, found)
    words = ("train", "--resume", "--out", bench.box / "run")
    word, more = next_call(bench, scenario, reference, words if whole_checkpoints(found) else None)
    return Round(scenario.name, name, place, word, message, [*details, *more])


def _after_signal(ended: Outcome, found: Contents) -> tuple[str, list[str]]:
    """Return a word for how a training ended after a signal: clear, where all is as it should be.

    A training that has done a step has a checkpoint of its last one, and says how to go on.
    """
    line = [f"status {ended.status}: {ended.error}"]
    if ended.status == 0:
        return "finished", []
    if ended.timed_out or (ended.after_signal or 0.0) > PROMPT_SECONDS:
        return "ends late", line
    if "Traceback" in ended.output:
        return "traceback", line
    step, whole = last_step(found), whole_checkpoints(found)
    saved = [int(name.removeprefix("step-")) for name in whole]
    if 0 < step < STEPS and step not in saved:
        return "no checkpoint", [f"{step} steps done, checkpoints {saved}", *line]
    if "graft train:" not in ended.output or (step and "--resume" not in ended.output):
        return "says nothing", line
    return "clear", []


# Campaigns ----------------------------------------------------------------------------------------


def killed(bench: Bench, scenario: Scenario, index: int, chance: random.Random) -> Round:
    """Kill at a random operation, before it or in its middle; half the time of a random kind."""
    reference = bench.reference(scenario)
    at = chance.randint(1, reference.operations)
    if chance.random() < 0.5:  # else nearly all would be writes
        kind = chance.choice(sorted({operation.kind for operation in reference.record}))
        at = chance.choice([entry.number for entry in reference.record if entry.kind == kind])
    return kill(bench, scenario, at, chance.choice((Action.KILL, Action.TEAR)))


def full(bench: Bench, scenario: Scenario, index: int, chance: random.Random) -> Round:
    """Fail from a random operation on, with each error in turn."""
    at = chance.randint(1, bench.reference(scenario).operations)
    return fail(bench, scenario, at, ERRORS[index % len(ERRORS)])


def powerless(bench: Bench, scenario: Scenario, index: int, chance: random.Random) -> Round:
    """Lose power after a random operation; in a tenth of the rounds after the last."""
    total = len(bench.reference(scenario).record)
    after = total if chance.random() < 0.1 else chance.randint(1, total)
    loss = chance.choices(list(Loss), weights=(4, 1, 1))[0]
    return power(bench, scenario, after, loss, chance.randrange(2**32))


def signalled(bench: Bench, scenario: Scenario, index: int, chance: random.Random) -> Round:
    """Send each signal in turn, at a random operation and at a random time in turn."""
    reference = bench.reference(scenario)
    at, seconds = chance.randint(1, reference.operations), chance.uniform(0.05, reference.seconds)
    number = SIGNALS[index % len(SIGNALS)]
    return interrupt(bench, scenario, number, at if index // 3 % 2 else None, seconds)


CAMPAIGNS: dict[str, Callable[[Bench, Scenario, int, random.Random], Round]] = {
    "kill": killed,
    "full": full,
    "power": powerless,
    "signals": signalled,
}


def rounds(
    campaign: str, bench: Bench, scenarios: Sequence[Scenario], count: int, seed: int
) -> Iterator[Round]:
    """Yield the rounds of a campaign, which goes through the scenarios in turn."""
    chance = random.Random(seed)
    for index in range(count):
        turn, place = divmod(index, len(scenarios))
        yield CAMPAIGNS[campaign](bench, scenarios[place], turn + place, chance)
