"""QLoRA training steps beside PEFT + bitsandbytes: seconds, peak memory, page faults, in one run.

Random weights of a Llama shape, random data, bf16 or fp32, rank 16 on all seven linear layers,
AdamW. Every case runs in processes of its own, in rounds A B C A B C ...; the peak is the largest
resident memory of the steps (VmHWM, set back after building) above that of a bare `import torch`.

    python benchmarks/step.py                                   the 1.1B shape, every comparison
    python benchmarks/step.py --shape 7b
    python benchmarks/step.py --isa avx2 --dtype float32        as on a processor without AVX-512
    python benchmarks/step.py --shape tiny                      a smoke test
    python benchmarks/step.py --tokens 2x512 --who graft-qlora --checkpointing none layers
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import _isa
import _peers
import torch
from _cases import CHECKPOINTING, DTYPES, TOKENS, WHO, Case, Comparison, comparisons, own_cases
from _common import write_csv
from _shapes import SHAPES, step_work
from _timing import (
    OTHER_LOAD_LIMIT,
    SETTINGS,
    ChildError,
    Laps,
    Limits,
    best_limits,
    forget_peak,
    give_back_freed,
    load_text,
    measure_limits,
    peak_bytes,
    print_table,
    resident_bytes,
    run_child,
    summarise,
    verdict,
)


def main() -> None:
    arguments = _arguments()
    if arguments.child is not None:
        print(json.dumps(_measure(**json.loads(arguments.child))))
        return
    _isa.choose(arguments.isa)
    cases = _cases(arguments)
    limits, failed = [], False
    results: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}
    for tokens in dict.fromkeys(case.tokens for case in cases):
        for _ in range(arguments.rounds):
            limits.append(run_child(__file__, {"case": None}))
            for case in cases:
                if case.tokens == tokens:
                    try:
                        results[case].append(_run(case, arguments.steps, arguments.warm_up))
                    except ChildError as error:
                        failed = True
                        print(f"failed: {case.tokens} {case.name}: {error}", flush=True)
    kept = {case: several for case, several in results.items() if several}
    if kept:
        _report(kept, best_limits(limits))
    if failed:
        raise SystemExit(1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="1.1b")
    _isa.add_argument(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--tokens", nargs="+", metavar="BATCHxLENGTH")
    parser.add_argument("--who", nargs="+", choices=WHO)
    parser.add_argument("--checkpointing", nargs="+", choices=CHECKPOINTING["graft"])
    parser.add_argument("--malloc", nargs="+", choices=SETTINGS)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a process")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before the measured ones")
    parser.add_argument("--rounds", type=int, default=2, help="processes for each case")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def _cases(arguments: argparse.Namespace) -> list[Case]:
    """Return the chosen cases, or the shape's own when none is chosen; peers only if installed."""
    shape = arguments.shape
    tokens = arguments.tokens or TOKENS[shape]
    if arguments.who or arguments.checkpointing or arguments.malloc:
        chosen = product(
            tokens,
            arguments.who or ["peft-qlora", "graft-qlora"],
            arguments.checkpointing or ["none"],
            arguments.malloc or ["default"],
        )
        cases = [Case(shape, *one) for one in chosen]
    else:
        cases = [case for one in tokens for case in own_cases(shape, one)]
    cases = [replace(case, dtype=arguments.dtype) for case in cases]
    cases = [case for case in cases if case.checkpointing in CHECKPOINTING[case.side]]
    reason = _peers.missing("peft", "bitsandbytes")
    if reason is not None and any(case.side == "peft" for case in cases):
        print(f"skipped the peers: {reason}")
        cases = [case for case in cases if case.side != "peft"]
    return cases


def _run(case: Case, steps: int, warm_up: int) -> dict[str, Any]:
    """Measure a case in a fresh process, once more when there was other load, and print it."""
    best: dict[str, Any] | None = None
    for _ in range(2):
        task = {"case": asdict(case), "steps": steps, "warm_up": warm_up}
        result: dict[str, Any] = run_child(__file__, task, case.malloc)
        if best is None or result["other"] < best["other"]:
            best = result
        if result["other"] <= OTHER_LOAD_LIMIT:
            break
    assert best is not None
    seconds = " ".join(f"{second:.2f}" for second in best["seconds"])
    print(f"{case.tokens} {case.name}: {seconds} s; {_peak_gb(best):.2f} GB", flush=True)
    return best


# Measuring, in a process of its own ---------------------------------------------------------------


def _measure(case: dict[str, str] | None, steps: int = 0, warm_up: int = 0) -> dict[str, Any]:
    if case is None:
        return asdict(measure_limits())
    bare = resident_bytes()
    _isa.limit()
    # Imported here, since "above a bare import torch" is counted from before.
    from _training import graft_training, peft_training

    chosen = Case(**case)
    shape = SHAPES[chosen.shape]
    torch.manual_seed(0)
    ids = torch.randint(shape.vocabulary, chosen.batch)
    build = peft_training if chosen.side == "peft" else graft_training
    dtype = getattr(torch, chosen.dtype)
    run = build(shape, chosen.method, chosen.checkpointing, ids, dtype)
    give_back_freed()
    built = resident_bytes()
    forget_peak()
    laps = Laps()
    loss = run(warm_up + steps, laps)
    if not torch.isfinite(torch.tensor(loss)):
        raise ArithmeticError(f"the loss is {loss}")
    return {
        "seconds": laps.seconds[warm_up:],
        "minor_faults": laps.minor_faults[warm_up:],
        "other": statistics.median(laps.other[warm_up:]),
        "bare": bare,
        "built": built,
        "peak": peak_bytes(),
        "threads": torch.get_num_threads(),
    }


# The tables ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """A case's figures over all its processes."""

    seconds: float
    peak_gb: float
    floor: float


def _peak_gb(result: dict[str, Any]) -> float:
    return (result["peak"] - result["bare"]) / 1e9


def _report(results: dict[Case, list[dict[str, Any]]], limits: Limits) -> None:
    from graft.kernels.backend.native_library import instructions

    found: dict[Case, _Found] = {}
    rows: list[dict[str, object]] = []
    for case, several in results.items():
        summary = summarise([second for one in several for second in one["seconds"]])
        faults = summarise([count for one in several for count in one["minor_faults"]])
        batch, length = case.batch
        recomputes = case.checkpointing == "layers"
        work = step_work(SHAPES[case.shape], batch, length, case.method, recomputes)
        floor = limits.floor(*work, case.dtype)
        peak = max(_peak_gb(one) for one in several)
        found[case] = _Found(summary.median, peak, floor)
        rows.append(
            {
                **asdict(case),
                "s/step": f"{summary.median:.3f}",
                "min": f"{summary.minimum:.3f}",
                "spread": f"{summary.spread:.0%}",
                "steps": summary.count,
                "tokens/s": f"{batch * length / summary.median:.0f}",
                "peak GB": f"{peak:.3f}",
                "built GB": f"{max(one['built'] - one['bare'] for one in several) / 1e9:.3f}",
                "faults/step": f"{faults.median:.0f}",
                "floor s": f"{floor:.3f}",
                "of floor": f"{floor / summary.median:.0%}",
                "other load": load_text(max(one["other"] for one in several)),
            }
        )
    shape, dtype = next((case.shape, case.dtype) for case in results)
    threads = next(iter(results.values()))[0]["threads"]
    print(f"\nshape {shape}, {dtype}, {instructions()}, {threads} threads; {limits.describe()}")
    print("peak and built: resident memory of the steps, and before them, above a bare import")
    print("torch; other load in cores, ! above 0.1\n")
    print_table(rows)
    name = f"step-{shape}" + ("" if dtype == "bfloat16" else f"-{dtype}")
    _compare(found, comparisons(shape, dtype), f"{name}-ratios")
    for row in rows:
        row |= {name: f"{value:.4g}" for name, value in asdict(limits).items()}
    print(f"wrote {write_csv(name, rows)}")


def _compare(found: dict[Case, _Found], asked: Sequence[Comparison], name: str) -> None:
    """Print the comparisons between cases that were measured."""
    rows: list[dict[str, object]] = []
    for one, (ours, our), (theirs, their) in product(asked, found.items(), found.items()):
        if not one.holds_for(ours, theirs):
            continue
        target = None if one.time is None else one.time * their.seconds
        judged = verdict(our.seconds, target, our.floor)
        limits = [one.peak * their.peak_gb] if one.peak is not None else []
        limits += [one.peak_gb] if one.peak_gb is not None else []
        if limits and our.peak_gb > min(limits):
            judged = f"{judged}, but peak above {min(limits):.2f} GB"
        rows.append(
            {
                "tokens": ours.tokens,
                "ours": f"{ours.who} {ours.checkpointing}",
                "theirs": theirs.name,
                "time": f"{our.seconds / their.seconds:.3f}",
                "target": "" if one.time is None else f"{one.time:.2f}",
                "floor": f"{our.floor / their.seconds:.3f}",
                "peak": f"{our.peak_gb / their.peak_gb:.3f}",
                "peak at most GB": f"{min(limits):.2f}" if limits else "",
                "verdict": judged,
            }
        )
    if rows:
        print("ours over theirs")
        print_table(rows)
        print(f"wrote {write_csv(name, rows)}")


if __name__ == "__main__":
    main()
