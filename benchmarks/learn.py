"""Does it learn? Every method at its defaults on E2E NLG: 300 steps, batch 16, rank 16, seed 0.

Perplexity per token on every 47th test row; on babyllama-361-1m tokens are characters. Beside it
the perplexity of the completions alone, from a run on prompt/completion rows of at most 256 tokens.
With --factors each method is also trained at multiples of its default learning rate: how far is the
default from the best of them?

    python benchmarks/learn.py [--model babyllama-361-1m] [--steps 300] [--methods lora qalora ...]
    python benchmarks/learn.py --rows text --factors 0.5 2 4 [--bits 3]
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from _common import as_text, e2e_rows, shared, write_csv, write_jsonl

import graft
from graft.api.run.report import RunReport

METHODS = ("lora", "qlora", "qalora", "affine", "merge_aware")
BOUNDS = {"lora": 1.45, "qlora": 1.46, "qalora": 1.56, "affine": 1.54}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="babyllama-361-1m")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--factors", nargs="+", type=float, default=[])
    parser.add_argument("--bits", type=int, help="of the integers; 4 by default")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--rows", nargs="+", default=["text", "completion"])
    arguments = parser.parse_args()
    model = shared("models", arguments.model)
    folder = Path(tempfile.mkdtemp())
    train_rows, test_rows = e2e_rows("train"), e2e_rows("test", every=47)
    files = {
        "text": (as_text(train_rows), as_text(test_rows)),
        "completion": (_short(train_rows), _short(test_rows)),
    }
    for kind, (train, test) in files.items():
        write_jsonl(folder / f"{kind}.train.jsonl", train)
        write_jsonl(folder / f"{kind}.test.jsonl", test)
    results: list[dict[str, object]] = []
    for kind in arguments.rows:
        for method in arguments.methods:
            default = None
            for factor in (1.0, *arguments.factors):
                run = folder / f"{method}-{kind}-{factor:g}"
                report = graft.finetune(
                    graft.TrainConfig(
                        model=str(model),
                        data=str(folder / f"{kind}.train.jsonl"),
                        eval_data=str(folder / f"{kind}.test.jsonl"),
                        method=method,
                        bits=None if method in ("lora", "qlora") else arguments.bits,
                        eos=False,
                        max_length=256,
                        steps=arguments.steps,
                        rank=arguments.rank,
                        learning_rate=default and default * factor,
                        out=str(run),
                    )
                )
                default = default or report.learning_rate
                results.append(_row(arguments, method, kind, factor, report))
                print({key: value for key, value in results[-1].items() if value != ""}, flush=True)
                shutil.rmtree(run)
            _print_best(results[-1 - len(arguments.factors) :])
    name = "rates" if arguments.factors else "learn"
    print(f"wrote {write_csv(f'{name}-{arguments.model}', results)}")
    shutil.rmtree(folder)


def _row(
    arguments: argparse.Namespace, method: str, kind: str, factor: float, report: RunReport
) -> dict[str, object]:
    bounded = kind == "text" and arguments.model == "babyllama-361-1m" and factor == 1
    return {
        "model": arguments.model,
        "method": method,
        "bits": "" if method in ("lora", "qlora") else arguments.bits or 4,
        "rows": kind,
        "rank": arguments.rank,
        "steps": arguments.steps,
        "times_default": factor,
        "learning_rate": report.learning_rate,
        "loss_before": round(report.eval_loss_before, 4),
        "perplexity": round(report.perplexity, 4),
        "bound": BOUNDS.get(method, "") if bounded else "",
        "seconds": round(report.seconds),
        "trained_parameters": report.trainable_parameters,
    }


def _print_best(rows: list[dict[str, object]]) -> None:
    """Print how far the first row, the default's, is from the best."""
    best = min(rows, key=lambda row: float(str(row["perplexity"])))
    ratio = float(str(rows[0]["perplexity"])) / float(str(best["perplexity"]))
    if len(rows) > 1:
        print(f"default over best (at {best['times_default']} times it): {ratio:.4f}", flush=True)


def _short(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the rows whose characters fit 256 tokens with BOS, a leading space and a newline."""
    return [row for row in rows if len(row["prompt"]) + len(row["completion"]) <= 252]


if __name__ == "__main__":
    main()
