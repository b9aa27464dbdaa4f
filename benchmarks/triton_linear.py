"""4-bit linears on a GPU against dense bf16 and bitsandbytes: N = K = 4096, M = 1, 16, 128, 512.

    python benchmarks/triton_linear.py [--turns 9] [--tokens 1 16 128 512]

Device time is measured with events, behind a kernel that keeps the GPU busy until every call is
queued, so that it holds no waiting for Python; host time is the wall clock of the same calls
without it, which is what an eager model sees. Weights are rotated so that no cache helps.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from unittest import mock

import torch
from _common import write_csv
from torch import Tensor
from torch.nn import functional

from graft.formats.base import WeightFormat
from graft.formats.codebook import CodebookFormat
from graft.formats.int_group import IntGroupFormat
from graft.kernels.frozen import ops, reference
from graft.kernels.frozen import triton as triton_backend

SIZE = 4096
COPIES = 20  # 160 MB in 4 bits, 640 MB in bf16: more than any GPU's cache
QUEUE_CYCLES = 50_000_000  # keeps the GPU busy for some 25 ms

Linear = Callable[[Tensor], Tensor]


def dense(weights: list[Tensor]) -> Linear:
    turn = itertools.cycle(weights)
    return lambda x: functional.linear(x, next(turn))


def graft(weights: list[Tensor], weight_format: WeightFormat) -> Linear:
    packed = [weight_format.kernel_weight(weight_format.pack(w), *w.shape) for w in weights]
    turn = itertools.cycle(packed)
    return lambda x: ops.linear(x, next(turn))


def along_rows(linear: Linear) -> Linear:
    """Return a product whose one token is summed along the rows, in one launch."""

    def call(x: Tensor) -> Tensor:
        with mock.patch.object(triton_backend, "_VECTOR_TOKENS", 1):
            return linear(x)

    return call


def bitsandbytes(weights: list[Tensor]) -> Linear:
    import bitsandbytes as bnb

    packed = [
        bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        for weight in weights
    ]
    turn = itertools.cycle(packed)

    def linear(x: Tensor) -> Tensor:
        codes, state = next(turn)
        return bnb.matmul_4bit(x, codes.t(), quant_state=state)

    return linear


def check_weights(weight: Tensor) -> None:
    """End the script when a kernel's weight differs from the reference's in a single bit."""
    for weight_format in (CodebookFormat(), CodebookFormat(name="fp4")):
        args = (weight, weight_format.name, 64)
        ours = triton_backend.codebook_quantize(*args)
        theirs = reference.codebook_quantize(*args)
        if not all(map(torch.equal, ours, theirs)):
            sys.exit(f"{weight_format.name}: codes or absmax differ from the reference")
    formats = [CodebookFormat(), CodebookFormat(name="fp4")]
    for weight_format in [*formats, *(IntGroupFormat(bits=bits) for bits in (2, 3, 4, 8))]:
        packed = weight_format.kernel_weight(weight_format.pack(weight), *weight.shape)
        ours = triton_backend.dequantize(packed, weight.dtype)
        if not torch.equal(ours, reference.dequantize(packed, weight.dtype)):
            sys.exit(f"{weight_format}: the weight differs from the reference's")


def forward(linear: Linear, x: Tensor) -> Callable[[], object]:
    def call() -> None:
        with torch.no_grad():
            linear(x)

    return call


def forward_backward(linear: Linear, x: Tensor) -> Callable[[], object]:
    leaf = x.clone().requires_grad_()
    grad = torch.randn_like(x)

    def call() -> None:
        torch.autograd.grad(linear(leaf), leaf, grad)

    return call


def device_seconds(call: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(QUEUE_CYCLES)
    begin.record()
    for _ in range(COPIES):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / COPIES


def host_seconds(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(COPIES):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / COPIES


def measure(
    task: str, tokens: int, calls: dict[str, Callable[[], object]], turns: int
) -> list[dict[str, object]]:
    """Time the calls in turn, A B C A B C ..., and return one row for each."""
    for call in calls.values():  # compiles the kernels
        call()
    device: dict[str, list[float]] = {name: [] for name in calls}
    host: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            device[name].append(device_seconds(call) * 1e6)
            host[name].append(host_seconds(call) * 1e6)
    rows: list[dict[str, object]] = []
    for name in calls:
        low, median, high = statistics.quantiles(device[name], n=4)
        ratio = median / statistics.median(device["dense bf16"])
        seen = statistics.median(host[name])
        print(
            f"{task:17} M={tokens:<4} {name:20} {median:9.1f} us  {ratio:5.2f} of dense"
            f"  (host {seen:.1f} us)",
            flush=True,
        )
        rows.append(
            {
                "task": task,
                "tokens": tokens,
                "candidate": name,
                "device_us": round(median, 2),
                "device_spread": round((high - low) / median, 3),
                "host_us": round(seen, 2),
                "of_dense": round(ratio, 3),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128, 512])
    arguments = parser.parse_args()
    if (reason := triton_backend.triton.why_unavailable()) is not None:
        print(f"skipped: {reason}")
        return
    import triton

    torch.manual_seed(0)
    weights = [
        torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16) / SIZE**0.5
        for _ in range(COPIES)
    ]
    check_weights(weights[0])
    linears = {
        "dense bf16": dense(weights),
        "graft nf4": graft(weights, CodebookFormat()),
        "graft nf4 double": graft(weights, CodebookFormat(double_quant=True)),
        "graft int4 group 32": graft(weights, IntGroupFormat()),
    }
    for name in ("graft nf4 double", "graft int4 group 32"):
        linears[f"{name} along rows"] = along_rows(linears[name])
    if importlib.util.find_spec("bitsandbytes") is None:
        print("without bitsandbytes: it is not installed")
    else:
        linears["bitsandbytes nf4 double"] = bitsandbytes(weights)
    rows = []
    for task in (forward, forward_backward):
        for tokens in arguments.tokens:
            x = torch.randn(tokens, SIZE, device="cuda", dtype=torch.bfloat16)
            calls = {
                name: task(linear, x)
                for name, linear in linears.items()
                if tokens == 1 or not name.endswith("along rows")
            }
            rows += measure(task.__name__, tokens, calls, arguments.turns)
    stamp = {"gpu": torch.cuda.get_device_name(), "triton": triton.__version__}
    print("written to", write_csv("triton-linear", [row | stamp for row in rows]))


if __name__ == "__main__":
    main()
