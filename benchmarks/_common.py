"""What the benchmarks share: the real data and models beside the checkout, and CSV results."""

from __future__ import annotations

import csv
import gzip
import json
import platform
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
RESULTS = ROOT / "benchmarks" / "results"


def shared(*parts: str) -> Path:
    """Return a path in ../shared, or end the script with the reason when it is not there."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        print(f"skipped: {Path('..', 'shared', *parts)} is not beside the checkout")
        sys.exit(0)
    return path


def e2e_rows(split: str, every: int = 1) -> list[dict[str, str]]:
    """Return every n-th row {"prompt", "completion"} of an E2E NLG split."""
    with gzip.open(shared("data", "e2e_nlg", f"{split}.jsonl.gz"), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file][::every]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, str]]) -> Path:
    """Write rows as JSON lines and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def as_text(rows: Iterable[Mapping[str, str]]) -> list[dict[str, str]]:
    """Return rows as {"text": prompt, newline, completion}."""
    return [{"text": row["prompt"] + "\n" + row["completion"]} for row in rows]


def write_csv(name: str, rows: list[dict[str, object]]) -> Path:
    """Write a table to benchmarks/results, stamped with the hardware and what of it was used."""
    import _isa
    import torch

    from graft.kernels.backend.native_library import instructions

    stamp = {
        "processor": _processor(),
        "instructions": instructions() or "no native library",
        "cores": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}{_isa.suffix()}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0], *stamp])
        writer.writeheader()
        writer.writerows({**row, **stamp} for row in rows)
    return path


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
