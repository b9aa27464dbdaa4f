"""A step of DPO beside one of supervised tuning on as many sequences: peak memory and time.

Both train the same model on the same sequences: 2 n rows, which for DPO are n pairs of a chosen and
a rejected answer to one prompt, half of each row. Each case is a process of its own, whose peak is
that of its resident memory from the first step on; `above` is that without what it held before.
`reference` is what the model from before training takes for as many sequences, once; a second
forward pass in each step would take that in every one.

    python benchmarks/preferences.py [--shape 0.1b] [--method qalora] [--pairs 4] [--length 256]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from _shapes import ALPHA, RANK, SHAPES
from _timing import print_table
from _training import graft_model

from graft.adapters.attach import adapter_parameters, attach_adapter
from graft.adapters.config import AdapterConfig
from graft.data.examples import Example
from graft.model.running.attention import use_own_attention
from graft.model.running.memory import peak_bytes, resident_bytes, reuse_freed_memory
from graft.model.running.pointwise import use_own_pointwise
from graft.model.running.rotary import use_own_rotary
from graft.model.targets import select_targets
from graft.objectives.base import Objective
from graft.objectives.dpo import DPO
from graft.objectives.next_token import NEXT_TOKEN
from graft.objectives.reference import Referenced, find_out, unknown

OBJECTIVES: dict[str, Objective] = {"next_token": NEXT_TOKEN, "dpo": DPO}


def main() -> None:
    """Run every case, and print how they compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="0.1b", choices=list(SHAPES))
    parser.add_argument("--method", default="qalora")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--case", choices=list(OBJECTIVES))
    given = parser.parse_args()
    if given.case:
        print(json.dumps(measured(given)))
        return
    found = {name: _child(name) for name in OBJECTIVES}
    rows = [
        {
            "objective": name,
            "peak MiB": f"{one['peak'] / 2**20:,.0f}",
            "above MiB": f"{one['above'] / 2**20:,.0f}",
            "step s": f"{one['step']:.3f}",
            "reference s": f"{one['reference']:.3f}",
        }
        for name, one in found.items()
    ]
    print_table(rows)
    peaks = [one["peak"] for one in found.values()]
    above = [one["above"] for one in found.values()]
    print(f"dpo / next_token: peak {peaks[1] / peaks[0]:.3f}, above {above[1] / above[0]:.3f}")


def _child(name: str) -> dict[str, float]:
    words = [sys.executable, *sys.argv, "--case", name]
    found: dict[str, float] = json.loads(subprocess.check_output(words, text=True))
    return found


def measured(given: argparse.Namespace) -> dict[str, float]:
    """Train some steps of one objective; return its peak and the medians of its times."""
    torch.manual_seed(0)
    shape = SHAPES[given.shape]
    model = graft_model(shape, given.method, torch.bfloat16)
    use_own_attention(model)
    config = AdapterConfig(method=given.method, rank=RANK, alpha=ALPHA).resolved(4)
    attach_adapter(model, select_targets(model, ()), config)
    use_own_pointwise(model)
    use_own_rotary(model)
    reuse_freed_memory()
    parameters = list(adapter_parameters(model, "default").values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    objective = OBJECTIVES[given.case]
    examples = _rows(given)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of making the model
    before = resident_bytes(torch.device("cpu"))
    spent = 0.0
    if objective.needs_reference:
        known = unknown(examples)
        begin = time.perf_counter()
        find_out(known, model, examples, range(len(examples)), len(examples))
        spent = time.perf_counter() - begin
        examples = list(Referenced(examples, known))
    model.train()
    times = []
    for _ in range(given.steps):
        begin = time.perf_counter()
        batch = objective.pack(examples)
        loss, _ = objective.loss(model, batch)
        (loss / batch.targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - begin)
    peak = peak_bytes(torch.device("cpu"))
    step = statistics.median(times[1:])
    return {"peak": peak, "above": peak - before, "step": step, "reference": spent}


def _rows(given: argparse.Namespace) -> list[Example]:
    """Return the sequences as rows of their own, or two by two as pairs."""
    generator = torch.Generator().manual_seed(1)
    half = given.length // 2
    targets = [False] * half + [True] * (given.length - half)
    found = []
    for number in range(given.pairs):
        asked = torch.randint(5, 1000, (half,), generator=generator).tolist()
        size = (2, given.length - half)
        sides = [
            asked + answer for answer in torch.randint(5, 1000, size, generator=generator).tolist()
        ]
        if given.case == "dpo":
            values = {"wanted": [True, False], "lengths": [given.length] * 2}
            found.append(Example(sides[0] + sides[1], targets * 2, f"pair {number}", values=values))
        else:
            found += [Example(side, targets, f"row {number}") for side in sides]
    return found


if __name__ == "__main__":
    main()
