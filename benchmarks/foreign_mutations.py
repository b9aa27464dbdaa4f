"""Other tools' folders with one thing changed: never a success that computes something else.

Each round takes a folder or file that a tool wrote, changes one thing (a tensor flipped, swapped,
dropped, duplicated or renamed; a key of the configuration changed, dropped or renamed; a shard
moved), reads it with the tool's own reader and with graft, and compares the logits. Right is: graft
refuses, computes what the owner's reader does, or says what it ignored. Rounds are seeded and each
runs in a child of a warm process, so a reader that dies is an outcome like any other.

    python benchmarks/foreign_mutations.py [--rounds 2000] [--kinds gptq peft ...]
    python benchmarks/foreign_mutations.py --round gptq:17       one round, with all that was said
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import multiprocessing
import os
import pickle
import random
import re
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _foreign_changes import change
from _foreign_owners import KINDS, Kind
from torch import Tensor

TIMEOUT = 120
LOT = 60
REFUSED, SAME, TOLD, HARMLESS, WRONG, BROKEN = (
    *("refused", "same", "told", "harmless", "WRONG", "TRACEBACK"),
)


@dataclass(frozen=True)
class Read:
    """What a reader made of a folder."""

    logits: Tensor | None
    said: tuple[str, ...] = ()
    failure: str = ""
    is_refusal: bool = False
    """The failure is a sentence for its user, and no traceback."""


@dataclass(frozen=True)
class Outcome:
    """One round."""

    name: str
    verdict: str
    changed: str
    difference: float
    owner: str
    ours: str
    said: tuple[str, ...]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--round", help="KIND:NUMBER")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.round:
        kind, _, number = arguments.round.partition(":")
        numbers = {kind: [int(number)]}
    else:
        each = -(-arguments.rounds // len(arguments.kinds))
        numbers = {
            kind: list(range(arguments.seed * each, (arguments.seed + 1) * each))
            for kind in arguments.kinds
        }
    found: list[Outcome] = []
    context = multiprocessing.get_context("spawn")
    with context.Pool(arguments.processes, maxtasksperchild=1) as pool:
        for outcomes in pool.imap_unordered(_rounds, _lots(numbers)):
            found += outcomes
            for outcome in outcomes:
                _show(outcome, bool(arguments.round))
    for kind in numbers:
        counts = Counter(one.verdict for one in found if one.name.startswith(f"{kind}:"))
        print(f"{kind:<20} {json.dumps(counts)}")
    print(f"{len(found)} rounds: {json.dumps(Counter(one.verdict for one in found))}")
    return int(any(one.verdict in (WRONG, BROKEN) for one in found))


def _lots(numbers: dict[str, list[int]]) -> list[tuple[str, list[int]]]:
    """Return parts of the work, each with a process and a folder of its own."""
    return [
        (kind, rounds[start : start + LOT])
        for kind, rounds in numbers.items()
        for start in range(0, len(rounds), LOT)
    ]


def _show(outcome: Outcome, whole: bool) -> None:
    """Print what is wrong, and what was told."""
    if whole or outcome.verdict in (WRONG, BROKEN):
        print(f"{outcome.verdict:<9} {outcome.name:<22} {outcome.changed}")
        print(f"          difference {outcome.difference:.1e}; owner: {outcome.owner[-300:]}")
        print(f"          graft: {outcome.ours[-600:]}")
    elif outcome.verdict == TOLD:
        print(f"told      {outcome.name:<22} {outcome.changed}: {' | '.join(outcome.said)[:300]}")
    for line in outcome.said if whole else ():
        print(f"          said: {line}")
    sys.stdout.flush()


def _rounds(work: tuple[str, list[int]]) -> list[Outcome]:
    """Make a kind's folder once, and change copies of it in children."""
    import peft  # noqa: F401  (once here, and not in every child)
    import transformers  # noqa: F401

    from graft import adopt, convert_model, load  # noqa: F401

    name, numbers = work
    kind = KINDS[name]
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    outcomes = []
    with tempfile.TemporaryDirectory() as place, _silence():
        seeds = Path(place) / "seed"
        seeds.mkdir()
        wrote = _in_a_child(_written, kind, seeds)
        if wrote.logits is None:
            raise RuntimeError(f"{name} cannot be written: {wrote.failure}")
        shutil.copytree(seeds, Path(place) / "untouched")
        untouched = _in_a_child(_ours, kind, Path(place) / "untouched")
        if untouched.logits is None:
            raise RuntimeError(f"{name}: graft does not read it unchanged: {untouched.failure}")
        for number in numbers:
            folder = Path(place) / "round"
            shutil.copytree(seeds, folder)
            changed = change(folder, kind, random.Random(f"{name}:{number}"))
            if changed:
                owner = _in_a_child(_owner, kind, folder)
                ours = _in_a_child(_ours, kind, folder)
                outcomes.append(_judged(f"{name}:{number}", kind, changed, owner, ours, untouched))
            shutil.rmtree(folder)
    return outcomes


def _judged(
    name: str, kind: Kind, changed: str, owner: Read, ours: Read, untouched: Read
) -> Outcome:
    before = {_wordy(line) for line in untouched.said}
    said = tuple(line for line in ours.said if _wordy(line) not in before)
    difference = float("nan")
    if ours.logits is None:
        verdict = REFUSED if ours.is_refusal else BROKEN
    else:
        if owner.logits is not None and owner.logits.shape == ours.logits.shape:
            difference = _difference(ours.logits, owner.logits)
        if difference <= kind.bound:
            verdict = SAME
        elif said:
            verdict = TOLD
        elif owner.logits is None and _difference(ours.logits, untouched.logits) <= kind.bound:
            verdict = HARMLESS  # the owner refuses what changes nothing
        else:
            verdict = WRONG
    return Outcome(name, verdict, changed, difference, owner.failure, ours.failure, said)


def _wordy(line: str) -> str:
    """Return a line without its numbers: another count of parameters says nothing."""
    return re.sub(r"[\d.,e+-]+", "#", line)


def _difference(ours: Tensor, theirs: Tensor | None) -> float:
    if theirs is None or ours.shape != theirs.shape:
        return float("nan")
    if torch.equal(ours.isfinite(), theirs.isfinite()):
        ours, theirs = ours.nan_to_num(), theirs.nan_to_num()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-9))


def _written(kind: Kind, folder: Path) -> Read:
    """Write what a kind's tool writes; in a child, as some tools' threads end with a fork."""
    torch.manual_seed(0)
    try:
        return Read(kind.write(folder))
    except BaseException:  # noqa: BLE001  (it is told by the parent)
        return Read(None, failure=traceback.format_exc())


def _owner(kind: Kind, folder: Path) -> Read:
    try:
        return Read(kind.owner(folder).float())
    except BaseException as error:  # noqa: BLE001  (whatever a reader raises is an outcome)
        return Read(None, failure=f"{type(error).__name__}: {error}")


def _ours(kind: Kind, folder: Path) -> Read:
    import graft
    from graft.cli.main import main as graft_main

    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            with contextlib.chdir(folder):
                codes = [graft_main(list(words)) for words in kind.commands]
            text = printed.getvalue().replace("\r", "\n")
            if any(codes):
                return Read(None, failure=text, is_refusal="Traceback" not in text)
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")
                model, _ = graft.load(folder / kind.result, dtype="float32")
        said = [*_lines(printed.getvalue()), *(str(one.message) for one in heard)]
        return Read(kind.logits(model), tuple(said))
    except graft.GraftError as error:
        return Read(None, failure=str(error), is_refusal=True)
    except BaseException:  # noqa: BLE001  (a traceback is a failure of graft's)
        return Read(None, failure=traceback.format_exc())


def _lines(text: str) -> list[str]:
    """Return what was printed, without bars and what names sizes."""
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines()]
    return [line for line in lines if line and "%" not in line and "MiB" not in line]


def _in_a_child(read: Callable[[Kind, Path], Read], kind: Kind, folder: Path) -> Read:
    """Run a reader in a child of this process, which it may kill."""
    into, out = os.pipe()
    child = os.fork()
    if not child:
        os.close(into)
        with os.fdopen(out, "wb") as pipe:
            pickle.dump(read(kind, folder), pipe)
        os._exit(0)
    os.close(out)
    with os.fdopen(into, "rb") as pipe:
        import select

        ready, _, _ = select.select([pipe], [], [], TIMEOUT)
        content = pipe.read() if ready else b""
    if not ready:
        os.kill(child, 9)
    _, status = os.waitpid(child, 0)
    if not content:
        return Read(None, failure=f"its process ended with {status}")
    result: Any = pickle.loads(content)
    assert isinstance(result, Read)
    return result


@contextlib.contextmanager
def _silence() -> Any:
    """What readers print to the terminal, in C too, goes nowhere."""
    kept, null = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(null, number)
    try:
        yield
    finally:
        for number, before in zip((1, 2), kept, strict=True):
            os.dup2(before, number)


if __name__ == "__main__":
    sys.exit(main())
