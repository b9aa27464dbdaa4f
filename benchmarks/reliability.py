"""What kills, full disks, power losses and signals leave of graft's files, in numbers.

Each round befalls a command with one fault, calls it again, and compares all that is left with what
an uninterrupted run leaves: tensors and other files byte for byte, JSON without times. The words of
the tables are explained in tests/faults/campaigns.py, the model of a power loss in
tests/faults/disk.py. Rounds are drawn by --seed; Linux on x86-64 with a C compiler.

    python benchmarks/reliability.py kill --rounds 500 --seed 0
    python benchmarks/reliability.py full --rounds 300
    python benchmarks/reliability.py power --rounds 100
    python benchmarks/reliability.py signals --rounds 60
    python benchmarks/reliability.py kill --only "train qalora" --rounds 20 --out kill.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from faults import shim  # noqa: E402
from faults.campaigns import CAMPAIGNS, Round, rounds  # noqa: E402
from faults.scenarios import TRAININGS, Bench, Scenario  # noqa: E402


def table(done: Sequence[Round]) -> str:
    """Return how often each word was the outcome, by scenario."""
    words = Counter(_words(found) for found in done)
    columns = [word for word, _ in words.most_common()]
    names = list(dict.fromkeys(found.scenario for found in done))
    counts = Counter((found.scenario, _words(found)) for found in done)
    lines = ["| | tries | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name in names:
        row = [counts[name, word] for word in columns]
        lines.append(f"| {name} | {sum(row)} | " + " | ".join(str(n or "") for n in row) + " |")
    total = [words[word] for word in columns]
    lines.append(f"| **all** | {len(done)} | " + " | ".join(map(str, total)) + " |")
    return "\n".join(lines)


def _words(found: Round) -> str:
    return f"{found.message}, {found.word}" if found.message else found.word


def scenarios(bench: Bench, campaign: str, only: Sequence[str]) -> list[Scenario]:
    """Return what the campaign's rounds go through in turn."""
    if only:
        return [bench.scenario(name) for name in only]
    if campaign == "signals":
        return [bench.training(name, save_every=None) for name in TRAININGS]
    trainings = bench.trainings()
    if campaign == "power":
        return trainings
    commands = bench.commands()
    if campaign == "kill":  # about as many rounds of training as of all other commands
        return [*trainings * (len(commands) // len(trainings)), *commands]
    return [*trainings, *commands]


def run(bench: Bench, campaign: str, options: argparse.Namespace) -> list[Round]:
    """Run one campaign, print its bad rounds as they come and its table at the end."""
    begin = time.perf_counter()
    chosen = scenarios(bench, campaign, options.only)
    done: list[Round] = []
    for found in rounds(campaign, bench, chosen, options.rounds, options.seed):
        done.append(found)
        if not found.good:
            what = f"{_words(found)}: {found.scenario}, {found.fault}, {found.place}"
            print(f"{len(done)}: {what}: {'; '.join(found.details)[:800]}", file=sys.stderr)
    good, seconds = sum(found.good for found in done), time.perf_counter() - begin
    print(f"\n{campaign}, seed {options.seed}: {good} of {len(done)} as they should be\n")
    print(f"{table(done)}\n\n{seconds:.0f} s", flush=True)
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("campaign", nargs="?", choices=(*CAMPAIGNS, "all"), default="all")
    parser.add_argument("--rounds", type=int, default=40, help="of each campaign")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], help="names of scenarios")
    parser.add_argument("--out", type=Path, help="JSON file of all rounds")
    options = parser.parse_args()
    reason = shim.why_not()
    if reason is not None:
        print(f"skipped: {reason}")
        return 0
    campaigns = tuple(CAMPAIGNS) if options.campaign == "all" else (options.campaign,)
    with tempfile.TemporaryDirectory() as folder, Bench(Path(folder) / "work") as bench:
        done = {campaign: run(bench, campaign, options) for campaign in campaigns}
    if options.out is not None:
        plain = {
            campaign: [asdict(found) | {"good": found.good} for found in found_rounds]
            for campaign, found_rounds in done.items()
        }
        data = {"seed": options.seed, "commit": _commit(), "campaigns": plain}
        options.out.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    return 0 if all(found.good for some in done.values() for found in some) else 1


def _commit() -> str:
    words = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
