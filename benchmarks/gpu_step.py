"""Training steps on a GPU beside PEFT (+ bitsandbytes): seconds and peak memory, in one run.

Random weights of a Llama shape, random data, bf16, rank 16 on all seven linear layers, AdamW. Every
case runs in a process of its own, in rounds A B C A B C ...; the peak is PyTorch's, of the steps
with the weights in it.

    python benchmarks/gpu_step.py [--shape 7b] [--tokens 4x512] [--checkpointing none layers]

Without a GPU, what a step would launch on one:

    python benchmarks/gpu_step.py --count [--shape 1.1b] [--who graft-qlora]

Everything that a GPU is asked in one call, in so many minutes: kernels against the reference, steps
beside PEFT and bitsandbytes, with and without CUDA graphs, launches, products with one token. With
--dry it runs on the CPU, at tiny shapes:

    python benchmarks/gpu_step.py --everything 9 [--out FOLDER] [--dry]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from itertools import product
from pathlib import Path
from typing import Any

import _gpu_everything
import _peers
import torch
from _common import write_csv
from _shapes import SHAPES
from _timing import ChildError, Laps, print_table, run_child

WHO = ("graft-lora", "peft-lora", "graft-qlora", "peft-qlora", "graft-qalora", "graft-affine")
RIVALS = {"graft-lora": "peft-lora", "graft-qlora": "peft-qlora", "graft-qalora": "peft-qlora"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="1.1b")
    parser.add_argument("--tokens", nargs="+", default=["4x512"], metavar="BATCHxLENGTH")
    parser.add_argument("--who", nargs="+", default=list(WHO))
    parser.add_argument("--checkpointing", nargs="+", default=["none"], choices=["none", "layers"])
    parser.add_argument("--steps", type=int, default=8, help="measured steps of a process")
    parser.add_argument("--warm-up", type=int, default=4, help="steps before the measured ones")
    parser.add_argument("--rounds", type=int, default=2, help="processes for each case")
    parser.add_argument("--cuda-graphs", action="store_true", help="in graft's own steps")
    parser.add_argument("--count", action="store_true", help="count launches, without a GPU")
    parser.add_argument("--everything", type=float, metavar="MINUTES", help="everything at once")
    parser.add_argument("--dry", action="store_true", help="everything on a CPU, tiny shapes")
    parser.add_argument("--out", type=Path, help="folder that gets a copy of the tables")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.count:
        _count(arguments.who, SHAPES[arguments.shape].layers)
        return
    if arguments.part is not None:
        print(json.dumps(_gpu_everything.do_part(json.loads(arguments.part))))
        return
    if arguments.everything is not None and (arguments.dry or torch.cuda.is_available()):
        sys.exit(
            _gpu_everything.Everything(arguments.everything, arguments.dry, arguments.out).run()
        )
    if not torch.cuda.is_available():
        print("skipped: no CUDA device")
        return
    if arguments.child is not None:
        print(json.dumps(_measure(**json.loads(arguments.child))))
        return
    if (reason := _peers.missing("peft", "bitsandbytes")) is not None:
        print(f"skipped the peers: {reason}")
        arguments.who = [who for who in arguments.who if not who.startswith("peft")]
    cases = list(product(arguments.tokens, arguments.checkpointing, arguments.who))
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {case: [] for case in cases}
    same = {"shape": arguments.shape, "steps": arguments.steps, "warm_up": arguments.warm_up}
    same["cuda_graphs"] = arguments.cuda_graphs
    for _, case in product(range(arguments.rounds), cases):
        tokens, checkpointing, who = case
        task = same | {"tokens": tokens, "checkpointing": checkpointing, "who": who}
        try:
            found[case].append(run_child(__file__, task))
            print(f"{' '.join(case)}: {_milliseconds(found[case][-1:])} ms", flush=True)
        except ChildError as error:
            print(f"failed: {' '.join(case)}: {error}", flush=True)
    rows = [_row(case, arguments.shape, found) for case in cases if found[case]]
    print_table(rows)
    print(f"wrote {write_csv(f'gpu-step-{arguments.shape}', rows)}")


def _count(who: list[str], layers: int) -> None:
    """Print what a decoder layer and a step of each of graft's methods launch."""
    from _launches import launch_table

    methods = [one.removeprefix("graft-") for one in who if one.startswith("graft-")]
    rows = [row for method in methods for row in launch_table(method, layers)]
    print_table(rows)
    print(f"wrote {write_csv('gpu-launches-counted', rows)}")


def _measure(
    shape: str,
    who: str,
    tokens: str,
    checkpointing: str,
    steps: int,
    warm_up: int,
    cuda_graphs: bool,
) -> dict[str, Any]:
    from _training import graft_training, peft_training

    batch, length = map(int, tokens.split("x"))
    side, _, method = who.partition("-")
    torch.manual_seed(0)
    case = SHAPES[shape], method, checkpointing
    with torch.device("cuda"):
        ids = torch.randint(SHAPES[shape].vocabulary, (batch, length))
        if side == "graft":
            train = graft_training(*case, ids, cuda_graphs=cuda_graphs)
        else:
            train = peft_training(*case, ids)
    torch.cuda.empty_cache()
    built = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    laps = Laps()
    loss = train(warm_up + steps, laps)
    if not torch.isfinite(torch.tensor(loss)):
        raise ArithmeticError(f"the loss is {loss}")
    return {
        "seconds": laps.seconds[warm_up:],
        "built": built,
        "peak": torch.cuda.max_memory_allocated(),
        "gpu": torch.cuda.get_device_name(),
    }


def _row(
    case: tuple[str, str, str], shape: str, found: dict[tuple[str, str, str], list[dict[str, Any]]]
) -> dict[str, object]:
    tokens, checkpointing, who = case
    peak = _peak(found[case])
    row: dict[str, object] = {
        "shape": shape,
        "tokens": tokens,
        "checkpointing": checkpointing,
        "who": who,
        "ms/step": _milliseconds(found[case]),
        "peak GB": f"{peak / 1e9:.2f}",
        "built GB": f"{max(one['built'] for one in found[case]) / 1e9:.2f}",
        "time over rival": "",
        "peak over rival": "",
    }
    rival = found.get((tokens, checkpointing, RIVALS.get(who, "")))
    if rival:
        ratio = _median(found[case]) / _median(rival)
        row |= {"time over rival": f"{ratio:.3f}", "peak over rival": f"{peak / _peak(rival):.3f}"}
    return row | {"gpu": found[case][0]["gpu"]}


def _median(several: list[dict[str, Any]]) -> float:
    return statistics.median(second for one in several for second in one["seconds"])


def _milliseconds(several: list[dict[str, Any]]) -> str:
    return f"{_median(several) * 1e3:.1f}"


def _peak(several: list[dict[str, Any]]) -> float:
    return max(one["peak"] for one in several)


if __name__ == "__main__":
    main()
