"""Which start is worth it? LoRA with every --init on E2E NLG: 150 steps, batch 8, rank 16.

Perplexity per token on every 47th test row, of the trained model, on the base as it is (dense), in
4-bit NormalFloat (nf4) and in integers of 2 bits (int2). With --factors each start is trained at
multiples of its default learning rate, too. Entries that are in the CSV of an earlier call are not
trained again. Writes benchmarks/results/starts-MODEL.csv and prints the means over the seeds.

    python benchmarks/starts.py [--model babyllama-361-1m] [--seeds 3] [--bases dense nf4 int2]
    python benchmarks/starts.py --seeds 1 --bases dense --factors 0.5 0.25
"""

from __future__ import annotations

import argparse
import csv
import shutil
import tempfile
from pathlib import Path
from statistics import fmean, stdev

from _common import RESULTS, as_text, e2e_rows, shared, write_csv, write_jsonl

import graft
from graft.adapters.starts.registry import STARTS

BASES: dict[str, dict[str, object]] = {
    "dense": {"method": "lora"},
    "nf4": {"method": "qlora"},
    "int2": {"method": "lora", "format": "int", "bits": 2},
}
WITH_OPTIONS: dict[str, dict[str, object]] = {"eva, rho 1": {"init": "eva", "eva_rho": 1.0}}
"""Starts with other options than their defaults, for --starts."""
Row = dict[str, object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="babyllama-361-1m")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bases", nargs="+", default=list(BASES))
    parser.add_argument("--starts", nargs="+", default=list(STARTS))
    parser.add_argument("--factors", nargs="+", type=float, default=[])
    arguments = parser.parse_args()
    model = shared("models", arguments.model)
    name = f"starts-{arguments.model}"
    rows = _read(RESULTS / f"{name}.csv")
    done = {_key(row) for row in rows}
    folder = Path(tempfile.mkdtemp())
    train = write_jsonl(folder / "train.jsonl", as_text(e2e_rows("train")))
    test = write_jsonl(folder / "test.jsonl", as_text(e2e_rows("test", every=47)))
    rates = {
        (str(row["base"]), str(row["start"])): float(str(row["learning_rate"]))
        for row in rows
        if float(str(row["times_default"])) == 1
    }
    for seed in range(arguments.seeds):
        for base in arguments.bases:
            for start in arguments.starts:
                if start == "loftq" and base == "dense":
                    continue
                for factor in (1.0, *arguments.factors):
                    row: Row = {"base": base, "start": start, "steps": arguments.steps}
                    row |= {"seed": seed, "times_default": factor}
                    if _key(row) in done:
                        continue
                    report = graft.finetune(
                        graft.TrainConfig(
                            model=str(model),
                            data=str(train),
                            eval_data=str(test),
                            eos=False,
                            max_length=256,
                            batch_size=8,
                            steps=arguments.steps,
                            seed=seed,
                            learning_rate=rates.get((base, start), 0) * factor or None,
                            out=str(folder / "run"),
                            **BASES[base],
                            **WITH_OPTIONS.get(start, {"init": start}),
                        )
                    )
                    shutil.rmtree(folder / "run")
                    rates.setdefault((base, start), report.learning_rate)
                    row |= {
                        "learning_rate": report.learning_rate,
                        "loss_before": round(report.eval_loss_before, 4),
                        "loss": round(report.eval_loss, 5),
                        "perplexity": round(report.perplexity, 4),
                        "trained_parameters": report.trainable_parameters,
                        "seconds": round(report.seconds),
                    }
                    rows.append(row)
                    write_csv(name, rows)
                    print(row, flush=True)
    shutil.rmtree(folder)
    print(_table(rows, arguments))


def _key(row: Row) -> tuple[str, ...]:
    names = ("base", "start", "steps", "seed", "times_default")
    return tuple(str(row[name]) for name in names)


def _read(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        stamp = ("processor", "instructions", "cores", "torch")
        return [
            {name: value for name, value in row.items() if name not in stamp}
            for row in csv.DictReader(file)
        ]


def _table(rows: list[Row], arguments: argparse.Namespace) -> str:
    """Return a table of the starts by base: mean and standard deviation of the perplexities."""
    lines = [
        "| start | times the default rate | " + " | ".join(arguments.bases) + " |",
        "|---|---|" + "---|" * len(arguments.bases),
    ]
    for start in arguments.starts:
        for factor in (1.0, *arguments.factors):
            cells = []
            for base in arguments.bases:
                wanted = (base, start, str(arguments.steps), str(factor))
                found = [
                    float(str(row["perplexity"]))
                    for row in rows
                    if _key(row)[:3] == wanted[:3] and str(row["times_default"]) == wanted[3]
                ]
                spread = f" ± {stdev(found):.4f}" if len(found) > 1 else ""
                cells.append(f"{fmean(found):.4f}{spread}" if found else "")
            lines.append(f"| `{start}` | {factor:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
