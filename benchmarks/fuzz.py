"""Mutate files that graft reads, and drive its commands with them: 10,000 rounds by default.

Each round ends in a GraftError or in an answer; where the mutation cannot change the answer, it is
compared. Anything else is a failure: another exception, a hang, too much memory, the death of the
process, a message that is too long or holds control characters.

    python benchmarks/fuzz.py --rounds 10000 --seed 0 --out results.json
    python benchmarks/fuzz.py --only config/0.17      # one round again, with all that it said
    python benchmarks/fuzz.py --targets config int-   # only targets whose names begin so

The files, mutations and commands are in tests/fuzz. The folder with the sound files is temporary;
--folder keeps it for the next call.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "fuzz"))

from fuzz_corpus import SMALL  # noqa: E402
from fuzz_runner import Case, Fuzzer, Outcome  # noqa: E402
from fuzz_targets import TARGETS  # noqa: E402


def main() -> int:
    """Run the campaign; the exit status is 1 when a round failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="*", default=[""], help="beginnings of names")
    parser.add_argument("--only", help="the name of one round")
    parser.add_argument("--out", type=Path, help="JSON file with the results")
    parser.add_argument("--folder", type=Path, help="where the sound files are kept")
    parser.add_argument("--small", action="store_true", help="fewer sound files, sooner made")
    arguments = parser.parse_args()
    if arguments.only:
        cases = [Case.named(arguments.only)]
    else:
        held = [name for name in TARGETS if not arguments.small or _in_small(name)]
        names = [name for name in held if name.startswith(tuple(arguments.targets))]
        numbers = range(arguments.rounds)
        cases = [Case(names[n % len(names)], n // len(names), arguments.seed) for n in numbers]
    with (
        tempfile.TemporaryDirectory(prefix="graft-fuzz-") as temporary,
        Fuzzer(arguments.folder or Path(temporary) / "fuzz", arguments.small) as fuzzer,
    ):
        fuzzer.control()
        outcomes = campaign(fuzzer, cases, talks=bool(arguments.only))
    results = summary(outcomes)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    show(results)
    return 1 if results["failures"] else 0


def _in_small(name: str) -> bool:
    parts = TARGETS[name].folder.split("/")
    return parts[0] != "compared" and (len(parts) == 1 or parts[1] in SMALL)


def campaign(fuzzer: Fuzzer, cases: list[Case], talks: bool) -> list[Outcome]:
    outcomes: list[Outcome] = []
    begin = time.perf_counter()
    for done, case in enumerate(cases, start=1):
        outcome = fuzzer.run(case)
        outcomes.append(outcome)
        if outcome.failed or talks:
            print(f"{case.name}: {outcome.status} {outcome.where}\n  {outcome.what[:300]}")
        if talks:
            print(outcome.detail)
            print(f"{outcome.seconds:.1f} s, {outcome.bytes / 2**20:.0f} MiB")
        if done % 500 == 0:
            rate = done / (time.perf_counter() - begin)
            print(f"{done} rounds, {rate:.1f} a second", flush=True)
    return outcomes


def summary(outcomes: list[Outcome]) -> dict[str, object]:
    """Return counts by target, and the failures by kind and place, each with its first rounds."""
    by_target: dict[str, Counter[str]] = {}
    failures: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        kind = "failed" if outcome.failed else outcome.status
        by_target.setdefault(outcome.case.target, Counter())[kind] += 1
        if outcome.failed:
            failures.setdefault((outcome.status, outcome.where), []).append(outcome)
    total = sum(by_target.values(), Counter())
    return {
        "rounds": len(outcomes),
        "total": dict(total),
        "slowest_seconds": max(outcome.seconds for outcome in outcomes),
        "largest_bytes": max(outcome.bytes for outcome in outcomes),
        "targets": {name: dict(counts) for name, counts in by_target.items()},
        "failures": [
            {
                "status": status,
                "where": where,
                "rounds": len(found),
                "targets": sorted({one.case.target for one in found}),
                "smallest": min((one.case.name for one in found), key=len),
                "seeds": [one.case.name for one in found[:20]],
                "what": found[0].what[:500],
                "detail": found[0].detail[-1500:],
            }
            for (status, where), found in sorted(failures.items(), key=lambda one: -len(one[1]))
        ],
    }


def show(results: dict[str, object]) -> None:
    print(json.dumps({key: results[key] for key in ("rounds", "total")}))
    for failure in results["failures"]:  # type: ignore[attr-defined]
        words = (failure["rounds"], failure["status"], failure["where"], failure["smallest"])
        print("{:5d}  {:<24} {:<56} {}".format(*words))


if __name__ == "__main__":
    sys.exit(main())
