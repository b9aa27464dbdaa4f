"""Does it learn? Every method at its defaults on E2E NLG: 300 steps, batch 16, rank 16, seed 0.

Perplexity per token on every 47th test row; on babyllama-361-1m tokens are characters. Beside it
the perplexity of the completions alone, from a run on prompt/completion rows of at most 256 tokens.

    python benchmarks/learn.py [--model babyllama-361-1m] [--steps 300] [--methods lora qalora ...]
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from _common import as_text, e2e_rows, shared, write_csv, write_jsonl

import graft

BOUNDS = {"lora": 1.45, "qlora": 1.46, "qalora": 1.56, "affine": 1.54}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="babyllama-361-1m")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--methods", nargs="+", default=list(BOUNDS))
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
    for method in arguments.methods:
        for kind in arguments.rows:
            report = graft.finetune(
                graft.TrainConfig(
                    model=str(model),
                    data=str(folder / f"{kind}.train.jsonl"),
                    eval_data=str(folder / f"{kind}.test.jsonl"),
                    method=method,
                    eos=False,
                    max_length=256,
                    steps=arguments.steps,
                    rank=arguments.rank,
                    learning_rate=arguments.learning_rate,
                    out=str(folder / f"{method}-{kind}"),
                )
            )
            bound = (
                BOUNDS[method] if kind == "text" and arguments.model == "babyllama-361-1m" else None
            )
            results.append(
                {
                    "model": arguments.model,
                    "method": method,
                    "rows": kind,
                    "rank": arguments.rank,
                    "steps": arguments.steps,
                    "learning_rate": report.learning_rate,
                    "loss_before": round(report.eval_loss_before, 4),
                    "perplexity": round(report.perplexity, 4),
                    "bound": bound or "",
                    "seconds": round(report.seconds),
                    "trained_parameters": report.trainable_parameters,
                }
            )
            print({key: value for key, value in results[-1].items() if value != ""}, flush=True)
    print(f"wrote {write_csv(f'learn-{arguments.model}', results)}")
    shutil.rmtree(folder)


def _short(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the rows whose characters fit 256 tokens with BOS, a leading space and a newline."""
    return [row for row in rows if len(row["prompt"]) + len(row["completion"]) <= 252]


if __name__ == "__main__":
    main()
