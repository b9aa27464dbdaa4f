"""One 4-bit linear layer beside dense bf16, bitsandbytes and PyTorch's int4pack, in one run.

Forward, forward and backward (the gradient of x alone), quantising to nf4 and dequantising to bf16,
with glibc's malloc as it comes and tuned to keep freed memory. Copies of each weight rotate, so
that none is in the cache when it is read. A result that misses its target only because the target
lies under the floor is marked "at floor" when it reaches 90 % of the floor's rate.

    python benchmarks/linear.py [--features 4096] [--tokens 1 4 16 128 512] [--turns 9] [--rounds 2]
    python benchmarks/linear.py --isa avx2 --dtype float32 --settings default
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import _isa
import _peers
import torch
from _common import write_csv
from _layers import FUSED, GRAFT, NF4, Candidate, candidates, check, copies, copy_packed
from _timing import (
    SETTINGS,
    Limits,
    Rotation,
    Summary,
    best_limits,
    interleave,
    load_text,
    measure_limits,
    print_table,
    run_child,
    summarise,
    verdict,
)
from torch import Tensor

from graft.formats.base import storage_bytes

PEER = {"graft nf4": FUSED, "graft int4": "int4pack"}
"""The fastest forward that the peers have for the same kind of weight."""

FORWARD_OF_DENSE = {
    "graft nf4": {1: 0.30, 16: 0.75, 128: 1.12, 512: 1.06},
    "graft int4": {1: 0.36, 16: 0.80, 128: 1.12, 512: 1.06},
}
BACKWARD_OF_DENSE = {128: 1.15, 512: 1.08}
FLOAT32_OF_DENSE = {1: 0.20, 4: 0.20, 16: 0.40, 128: 0.85, 512: 1.0}
FLOAT32_BACKWARD_OF_DENSE = {128: 1.0, 512: 1.0}
DTYPES = ("bfloat16", "float32")
QUANTISE_SPEEDUP = 50
DEQUANTISE_SPEEDUP = {"default": 9, "tuned": 0.9}

Key = tuple[str, str, str, int, str]
"""(setting, operation, dtype, tokens, what)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=4096, help="in and out features")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 128, 512])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    _isa.add_argument(parser)
    parser.add_argument("--turns", type=int, default=9, help="turns of each candidate a process")
    parser.add_argument("--rounds", type=int, default=2, help="processes for each setting")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        _isa.limit()
        print(json.dumps(_measure(**json.loads(arguments.child))))
        return
    _isa.choose(arguments.isa)
    reason = _peers.missing("bitsandbytes")
    if reason is not None:
        print(f"without bitsandbytes: {reason}")
    task = {name: getattr(arguments, name) for name in ("features", "tokens", "turns", "dtype")}
    samples: dict[Key, list[_Sample]] = {}
    limits = []
    for _ in range(arguments.rounds):
        for setting in arguments.settings:
            result = run_child(__file__, task, setting)
            limits.append(result["limits"])
            for entry in result["measured"]:
                sample = _Sample(**entry)
                samples.setdefault((setting, *sample.key()), []).append(sample)
    _report(samples, best_limits(limits), arguments.features)


# Measuring, in a process of its own ---------------------------------------------------------------


@dataclass(frozen=True)
class _Sample:
    """What one process measured of one candidate."""

    operation: str
    dtype: str
    tokens: int
    what: str
    seconds: list[float]
    other: float
    operations: float
    read_bytes: float

    def key(self) -> tuple[str, str, int, str]:
        return self.operation, self.dtype, self.tokens, self.what


def _measure(features: int, tokens: list[int], turns: int, dtype: list[str]) -> dict[str, Any]:
    limits = measure_limits(features)
    measured: list[_Sample] = []
    for computed in (getattr(torch, name) for name in dtype):
        weight = (torch.randn(features, features) * 0.02).to(computed)
        made = candidates(weight)
        check(made, weight)
        for count in tokens:
            measured += _products(made, "forward", computed, count, features, turns)
            if count >= 128:
                measured += _products(made, "forward+backward", computed, count, features, turns)
        if computed == torch.bfloat16:
            measured += _roundings(weight, turns)
        del made
    return {"limits": asdict(limits), "measured": [asdict(sample) for sample in measured]}


def _products(
    made: Mapping[str, Candidate],
    operation: str,
    dtype: torch.dtype,
    tokens: int,
    features: int,
    turns: int,
) -> list[_Sample]:
    backward = operation != "forward"
    x = torch.randn(tokens, features, dtype=dtype, requires_grad=backward)
    grad = torch.randn(tokens, features, dtype=dtype)
    chosen = {name: one for name, one in made.items() if one.differentiable or not backward}

    def timed(candidate: Candidate) -> Callable[[], object]:
        if backward:
            return lambda: torch.autograd.grad(candidate.call(x), x, grad)
        return lambda: candidate.call(x)

    with torch.set_grad_enabled(backward):
        result = interleave({name: timed(one) for name, one in chosen.items()}, turns)
    times = 2 if backward else 1
    return [
        _Sample(
            operation,
            str(dtype).removeprefix("torch."),
            tokens,
            name,
            result.seconds[name],
            result.other,
            times * 2.0 * tokens * features * features,
            times * float(one.packed_bytes + 2 * x.nbytes),
        )
        for name, one in chosen.items()
    ]


def _roundings(weight: Tensor, turns: int) -> list[_Sample]:
    """Time quantising the weight to nf4 and dequantising it."""
    rows, columns = weight.shape
    nf4_bytes = storage_bytes(NF4, rows, columns)
    packed = NF4.pack(weight)
    ours = Rotation([copy_packed(packed) for _ in range(copies(nf4_bytes))])
    dense = Rotation([weight.clone() for _ in range(copies(weight.nbytes))])
    calls: dict[str, dict[str, Callable[[], object]]] = {
        "quantise": {"graft nf4": lambda: NF4.pack(dense())},
        "dequantise": {"graft nf4": lambda: NF4.unpack(ours(), rows, columns, weight.dtype)},
    }
    if _peers.missing("bitsandbytes") is None:
        peer = _peers.bitsandbytes_quantise(weight)
        theirs = Rotation([_peers.bitsandbytes_copy(peer) for _ in range(copies(nf4_bytes))])
        calls["quantise"]["bitsandbytes"] = lambda: _peers.bitsandbytes_quantise(dense())
        calls["dequantise"]["bitsandbytes"] = lambda: _peers.bitsandbytes_dequantise(theirs())
    moved = float(weight.nbytes + nf4_bytes)
    samples = []
    for operation, timed in calls.items():
        result = interleave(timed, turns)
        samples += [
            _Sample(operation, "bfloat16", 0, name, seconds, result.other, 0.0, moved)
            for name, seconds in result.seconds.items()
        ]
    return samples


# The tables ---------------------------------------------------------------------------------------


def _report(samples: dict[Key, list[_Sample]], limits: Limits, features: int) -> None:
    found = {
        key: summarise([second for one in several for second in one.seconds])
        for key, several in samples.items()
    }
    rows: list[dict[str, object]] = []
    for key, summary in found.items():
        several = samples[key]
        floor = limits.floor(several[0].operations, several[0].read_bytes, key[2])
        other = max(one.other for one in several)
        rows.append(_row(key, summary, floor, other, _target(key, found), found))
    print(f"in and out features {features}, {torch.get_num_threads()} threads; {limits.describe()}")
    print("milliseconds: median, minimum, interquartile range; other load in cores, ! above 0.1\n")
    if not any(key[4] == FUSED for key in found):
        print(f"{FUSED} was not measured: it needs bitsandbytes and AVX-512 bf16")
    for setting in dict.fromkeys(key[0] for key in found):
        shown = [row for row in rows if row["malloc"] == setting]
        print(f"malloc {setting}")
        print_table([{key: row[key] for key in row if key != "malloc"} for row in shown])
    for row in rows:
        row |= {"features": features}
        row |= {name: f"{value:.4g}" for name, value in asdict(limits).items()}
    print(f"wrote {write_csv('linear', rows)}")


def _row(
    key: Key,
    summary: Summary,
    floor: float,
    other: float,
    target: tuple[float, str] | None,
    found: dict[Key, Summary],
) -> dict[str, object]:
    setting, operation, dtype, tokens, what = key
    dense = found.get((setting, operation, dtype, tokens, "dense"))
    seconds = None if target is None else target[0]
    return {
        "malloc": setting,
        "operation": operation,
        "dtype": dtype,
        "tokens": tokens or "",
        "what": what,
        "ms": f"{summary.median * 1e3:.3f}",
        "min": f"{summary.minimum * 1e3:.3f}",
        "spread": f"{summary.spread:.0%}",
        "turns": summary.count,
        "of dense": "" if dense is None else f"{summary.median / dense.median:.3f}",
        "target": "" if target is None else f"{target[0] * 1e3:.3f} ({target[1]})",
        "floor": f"{floor * 1e3:.3f}",
        "verdict": verdict(summary.median, seconds, floor),
        "other load": load_text(other),
    }


def _target(key: Key, found: dict[Key, Summary]) -> tuple[float, str] | None:
    """Return the strictest of the targets that apply, in seconds, and what sets it."""
    setting, operation, dtype, tokens, what = key
    if what not in GRAFT:
        return None
    targets: list[tuple[float, str]] = []

    def add(factor: float | None, name: str, which: str = setting) -> None:
        other = found.get((which, operation, dtype, tokens, name))
        if factor is not None and other is not None:
            shown = name if which == setting else f"{name} {which}"
            targets.append((factor * other.median, f"{factor:.3g} x {shown}"))

    if operation == "forward" and dtype == "bfloat16":
        add(FORWARD_OF_DENSE[what].get(tokens), "dense")
        add(1.0, PEER[what])
    elif operation == "forward":
        add(FLOAT32_OF_DENSE.get(tokens), "dense")
    elif operation == "forward+backward" and dtype == "float32":
        add(FLOAT32_BACKWARD_OF_DENSE.get(tokens), "dense")
    elif operation == "forward+backward":
        add(BACKWARD_OF_DENSE.get(tokens), "dense")
    elif operation == "quantise":
        add(1 / QUANTISE_SPEEDUP, "bitsandbytes")
    elif setting == "tuned":
        # So graft's commands run (`graft.model.running.memory`), whatever the peer's process does.
        for which, speedup in DEQUANTISE_SPEEDUP.items():
            add(1 / speedup, "bitsandbytes", which)
    return min(targets, default=None)


if __name__ == "__main__":
    main()
