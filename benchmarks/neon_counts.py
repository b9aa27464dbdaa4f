"""How many instructions the native kernels execute on NEON for each weight: an estimate of speed.

There is no Arm processor here. The kernels are built by a cross compiler and run under QEMU's
user-mode emulation, and a plugin counts what they execute. Instructions are not time: a core that
executes more of them at once is faster, and memory may be slower than either. What can be read
from the table is how far a kernel is from the multiply-adds that it cannot do without (`floor`:
four products in each instruction, and one load of a vector of codes), and whether a change helps.

    python benchmarks/neon_counts.py [--features 1024] [--rows 192] [--tokens 1 4 16 128]

Needs g++-aarch64-linux-gnu, gcc and qemu-user, by Debian's names.
"""

from __future__ import annotations

import argparse
import mmap
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from _common import ROOT, write_csv
from torch import Tensor

from graft.formats.base import WeightFormat
from graft.formats.codebook import CodebookFormat
from graft.formats.dense import DenseFormat
from graft.formats.int8 import Int8Format
from graft.formats.int_group import IntGroupFormat
from graft.kernels.backend import native_library
from graft.kernels.frozen import native

sys.path.insert(0, str(ROOT / "tests" / "kernels"))

FORMATS: dict[str, WeightFormat] = {
    "dense": DenseFormat("float32"),
    "nf4": CodebookFormat(),
    **{f"int{bits}": IntGroupFormat(bits=bits, group_size=64) for bits in (2, 3, 4, 8)},
    "int8 rows": Int8Format(),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Counter:
    """What was executed since the last question."""

    def __init__(self, file: Path) -> None:
        file.write_bytes(bytes(4096))
        with file.open("r+b") as opened:
            self._memory = mmap.mmap(opened.fileno(), 4096)
        self._before = (0, 0, 0)

    def since(self) -> tuple[int, int, int]:
        """Return instructions, multiply-adds of four floats, loads and stores."""
        now = struct.unpack_from("<3Q", self._memory)
        before, self._before = self._before, now
        return tuple(a - b for a, b in zip(now, before, strict=True))


def measured(counter: Counter, call: Callable[[], object]) -> tuple[int, int, int]:
    call()  # what is compiled and allocated once
    counter.since()
    call()
    return counter.since()


def products(name: str, dtype: str, rows: int, features: int) -> dict[str, Callable[[int], Tensor]]:
    """Return the products with a weight of a format by name; each takes a number of tokens."""
    weight_format = FORMATS[name]
    if name == "dense":
        weight_format = DenseFormat(str(DTYPES[dtype]).removeprefix("torch."))
    packed = weight_format.pack(torch.randn(rows, features))
    weight = weight_format.kernel_weight(packed, rows, features)

    def inputs(tokens: int, count: int) -> Tensor:
        return torch.randn(tokens, count).to(DTYPES[dtype])

    found: dict[str, Callable[[int], Tensor]] = {
        "linear": lambda tokens: native.linear(inputs(tokens, features), weight),
        "grad_input": lambda tokens: native.grad_input(inputs(tokens, rows), weight),
    }
    if name == "int4":
        found["grad_statistics"] = lambda tokens: native.int_group_grad_statistics(
            inputs(tokens, rows), inputs(tokens, features), weight, None
        )[0]
    return found


def main() -> None:
    """Count and print."""
    from emulated_library import EmulatedLibrary, build, why_impossible

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--features", type=int, default=1024, help="columns of the weight")
    parser.add_argument("--rows", type=int, default=192, help="rows of the weight")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 128])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    arguments = parser.parse_args()
    reason = why_impossible()
    if reason is not None:
        print(f"skipped: {reason}")
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        plugin, counts = Path(folder, "counts.so"), Path(folder, "counts")
        source = Path(__file__).with_name("_neon_counts.c")
        subprocess.run(
            ["gcc", "-O2", "-shared", "-fPIC", "-o", str(plugin), str(source)], check=True
        )
        counter = Counter(counts)
        options = "-plugin", f"file={plugin},counts={counts}"
        library = EmulatedLibrary(build(ROOT / "build"), *options)
        native_library._load = lambda: library
        print("An estimate: instructions that an emulator executed, not time on a processor.\n")
        print(f"{'product':<28}{'tokens':>7}{'instructions':>14}{'floor':>8}{'FMAs each':>11}")
        rows = []
        for dtype in arguments.dtypes:
            for name in arguments.formats:
                calls = products(name, dtype, arguments.rows, arguments.features)
                for product, call in calls.items():
                    for tokens in arguments.tokens:
                        if product != "linear" and tokens < 16:
                            continue
                        rows.append(row(counter, dtype, name, product, tokens, call, arguments))
        write_csv("neon_counts", rows)
        library.close()


def row(
    counter: Counter,
    dtype: str,
    name: str,
    product: str,
    tokens: int,
    call: Callable[[int], Tensor],
    arguments: argparse.Namespace,
) -> dict[str, object]:
    """Count one product, print and return its line of the table."""
    executed, fused, memory = measured(counter, lambda: call(tokens))
    weights = arguments.rows * arguments.features
    bits = {"nf4": 4, "int2": 2, "int3": 3, "int4": 4}.get(name, 8)
    bits = (32 if dtype == "fp32" else 16) if name == "dense" else bits
    floor = tokens / 4 + bits / 128
    each = tokens * weights / executed
    print(
        f"{f'{product} {name} {dtype}':<28}{tokens:>7}{executed / weights:>14.2f}"
        f"{floor:>8.2f}{each:>11.2f}"
    )
    return {
        "product": product,
        "format": name,
        "dtype": dtype,
        "tokens": tokens,
        "instructions per weight": round(executed / weights, 3),
        "floor": round(floor, 3),
        "products per instruction": round(each, 3),
        "vector multiply-adds per weight": round(fused / weights, 3),
        "loads and stores per weight": round(memory / weights, 3),
    }


if __name__ == "__main__":
    main()
