"""What it costs a training that nothing of it is lost and that it looks after itself.

Runs `graft train` in this process on a model folder of random weights (a Llama shape in nf4), with
all that is on by default and a checkpoint in the middle, and adds up the time inside each part that
is not the step itself: the snapshot that a checkpoint of this step would need, the look at a stop,
the gates, metrics, checkpoints, status, and the two passes over the general text. Parts of each
step are given per step and as a share of it; parts of a run in seconds, and in steps.

    python benchmarks/run_costs.py                 the 1.1B shape, 16 steps of 1 x 256 tokens
    python benchmarks/run_costs.py --shape tiny    a smoke test

Ends with status 1 when the parts of each step of the 1.1B shape take more than 3 % of it.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _packed_folder import write_packed_folder
from _shapes import SHAPES

import graft
from graft.api.run import watching
from graft.api.run.status import StatusFile
from graft.formats.registry import make_format
from graft.train import loop
from graft.train.gates import Gates
from graft.train.stop import Stop

LIMIT = 0.03
EACH_STEP = ("snapshot", "look at a stop", "gates", "metrics")
PARTS: dict[str, list[tuple[Any, str]]] = {
    "snapshot": [(loop._Loop, "_now")],
    "look at a stop": [(Stop, "check")],
    "gates": [(Gates, "gradients"), (Gates, "outputs")],
    "metrics": [(loop._Loop, "_record")],
    "checkpoints": [(loop, "save_checkpoint")],
    "status": [(StatusFile, "_write")],
    "general text": [(watching.Watching, "begins"), (watching.Watching, "drift")],
}


def timed(spent: list[float], function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            spent.append(time.perf_counter() - begin)

    return call


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="1.1b")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256, help="of the one row of a step")
    options = parser.parse_args()
    spent: dict[str, list[float]] = defaultdict(list)
    for part, functions in PARTS.items():
        for owner, name in functions:
            setattr(owner, name, timed(spent[part], getattr(owner, name)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weight_format = make_format("nf4", {"double_quant": True})
        write_packed_folder(folder / "base", SHAPES[options.shape], weight_format)
        rows = [json.dumps({"text": f"{n:04d} " * (options.tokens // 5)}) for n in range(64)]
        (folder / "rows.jsonl").write_text("\n".join(rows))
        config = graft.TrainConfig(
            model=str(folder / "base"),
            data=str(folder / "rows.jsonl"),
            out=str(folder / "run"),
            method="qlora",
            steps=options.steps,
            batch_size=1,
            eval_fraction=0.02,
            max_length=options.tokens,
            save_every=options.steps // 2,
        )
        report = graft.finetune(config)
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        kept = sorted((folder / "run" / "checkpoints").iterdir())
        size = sum(file.stat().st_size for file in kept[-1].iterdir())
    steps = [entry["step_seconds"] for entry in map(json.loads, lines) if "step_seconds" in entry]
    step = sorted(steps)[len(steps) // 2]
    print(f"{options.shape} shape, 1 x {options.tokens} tokens: {step:.3f} s a step (median)")
    print(f"{report.seconds:.0f} s in all, a checkpoint of {size / 2**20:.1f} MiB\n")
    print("| part | calls | seconds | |\n|---|---|---|---|")
    share = 0.0
    for part in PARTS:
        total = sum(spent[part])
        if part in EACH_STEP:
            share += total / len(steps) / step
            text = (
                f"{1e3 * total / len(steps):.3f} ms a step, {total / len(steps) / step:.3%} of it"
            )
        else:
            text = f"{total / step:.2f} steps"
        print(f"| {part} | {len(spent[part])} | {total:.4f} | {text} |")
    print(f"\nparts of each step: {share:.2%} of it (at most {LIMIT:.0%})")
    return 0 if share <= LIMIT or options.shape != "1.1b" else 1


if __name__ == "__main__":
    sys.exit(main())
