"""What the deployed file scores: every method at its defaults at 4, 3 and 2 bits, by graft compare.

Tasks: e2e (E2E NLG as text, perplexity per token on every 47th test row) and recovery (TinyStories,
on which the model was trained: the first 80 held-out stories; how much of what rounding lost comes
back). 300 steps (or --steps, a table of its own), batch 16, groups of 32, rows of at most 256
tokens. Writes benchmarks/results/quality-MODEL-TASK.csv and, from all of those that there are,
benchmarks/quality.md. The comparison's folder is kept, so that the same command goes on with it.

    python benchmarks/quality.py [--model babyllama-361-1m] [--tasks e2e recovery] [--seeds 3]
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
from pathlib import Path
from statistics import fmean, stdev

from _common import RESULTS, ROOT, as_text, e2e_rows, shared, write_csv, write_jsonl

import graft

CONTENDERS = (
    "base",
    "base+rtn",
    "base+gptq",
    "base+qep",
    "lora",
    "lora+rtn",
    "lora+gptq",
    "lora+qep",
    "qlora+gptq",
    "qalora",
    "affine",
    "merge_aware",
)
STEPS = 300
PAGE = ROOT / "benchmarks" / "quality.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="babyllama-361-1m")
    parser.add_argument("--tasks", nargs="+", default=["e2e", "recovery"])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS))
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=RESULTS / "quality")
    arguments = parser.parse_args()
    for task in arguments.tasks:
        name = f"{arguments.model}-{task}"
        if arguments.steps != STEPS:
            name += f"-{arguments.steps}"
        folder = arguments.out / name
        data = write_jsonl(folder.with_suffix(".train.jsonl"), _rows(task, training=True))
        held_out = write_jsonl(folder.with_suffix(".test.jsonl"), _rows(task, training=False))
        graft.compare(
            graft.CompareConfig(
                model=str(shared("models", arguments.model)),
                data=str(data),
                eval_data=str(held_out),
                contenders=tuple(arguments.contenders),
                bits=tuple(arguments.bits),
                seeds=arguments.seeds,
                steps=arguments.steps,
                eos=False,
                max_length=256,
                out=str(folder),
            )
        )
        shared_columns = {"model": arguments.model, "task": task, "steps": arguments.steps}
        rows = [shared_columns | entry for entry in _results(folder)]
        print(f"wrote {write_csv(f'quality-{name}', rows)}")
    write_page(sorted(RESULTS.glob("quality-*.csv")))
    print(f"wrote {PAGE}")


def _results(folder: Path) -> list[dict[str, object]]:
    """Return what is scored in a comparison's folder, by earlier calls too."""
    found = []
    for file in (folder / "results").glob("*.json"):
        entry = json.loads(file.read_text(encoding="utf-8"))
        found.append({key: "" if one is None else one for key, one in entry.items()})
        del found[-1]["texts"]
    names = [*CONTENDERS, *sorted({entry["contender"] for entry in found} - set(CONTENDERS))]
    return sorted(
        found,
        key=lambda entry: (
            names.index(entry["contender"]),
            -int(entry["bits"] or 99),
            int(entry["seed"] or 0),
        ),
    )


def _rows(task: str, training: bool) -> list[dict[str, str]]:
    if task == "e2e":
        return as_text(e2e_rows("train") if training else e2e_rows("test", every=47))
    name = "train" if training else "heldout"
    path = shared("data", "tinystories", f"{name}.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return rows if training else rows[:80]


def write_page(tables: list[Path]) -> None:
    """Write quality.md: one table per model and task."""
    parts = [
        "# Deployed quality\n",
        "Perplexity per held-out token of the deployed files, mean ± sample standard deviation "
        "over the seeds, or of one seed where no ± stands; in brackets the mean, over the seeds, "
        "of the ratio to unquantised LoRA of the same seed, or, where the model returns to the "
        "text that it was trained on, the share of what rounding to nearest lost that comes back. "
        "Reproduced by `python benchmarks/quality.py`.\n",
    ]
    for path in tables:
        with path.open(encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["perplexity"]]
        if rows:
            parts.append(_table(rows))
    PAGE.write_text("\n".join(parts), encoding="utf-8")


def _table(rows: list[dict[str, str]]) -> str:
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        key = row["contender"], row["bits"]
        found.setdefault(key, {})[row["seed"]] = float(row["perplexity"])
    widths = sorted({bits for _, bits in found if bits}, reverse=True)
    first, recovery = rows[0], rows[0]["task"] == "recovery"
    lines = [
        f"## {first['model']}, {first['task']}, {first['steps']} steps\n",
        "| | trained parameters | dense | " + " | ".join(f"{bits} bits" for bits in widths) + " |",
        "|---|" + "---|" * (2 + len(widths)),
    ]
    for contender in dict.fromkeys(name for name, _ in found):
        trained = next(row["trained_parameters"] for row in rows if row["contender"] == contender)
        cells = [
            _recovered(found, contender, bits) if recovery else _ratio(found, contender, bits)
            for bits in ("", *widths)
        ]
        count = f"{int(trained):,}" if trained else ""
        lines.append(f"| {contender} | {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _ratio(found: dict[tuple[str, str], dict[str, float]], contender: str, bits: str) -> str:
    here, lora = found.get((contender, bits), {}), found.get(("lora", ""), {})
    paired = [value / lora[seed] for seed, value in here.items() if seed in lora]
    return _cell(here) + (f" ({fmean(paired):.4f})" if paired and contender != "lora" else "")


def _recovered(found: dict[tuple[str, str], dict[str, float]], contender: str, bits: str) -> str:
    """Return the share (rounded - here) / (rounded - dense base) beside the perplexity."""
    here = found.get((contender, bits), {})
    rounded, dense = found.get(("base+rtn", bits), {}), found.get(("base", ""), {})
    if not here or not bits or not rounded or not dense or contender == "base+rtn":
        return _cell(here)
    lost, best = fmean(rounded.values()), fmean(dense.values())
    return f"{_cell(here)} ({(lost - fmean(here.values())) / (lost - best):.0%})"


def _cell(here: dict[str, float]) -> str:
    if not here:
        return ""
    spread = f" ± {stdev(here.values()):.4f}" if len(here) > 1 else ""
    return f"{fmean(here.values()):.4f}{spread}"


if __name__ == "__main__":
    main()
