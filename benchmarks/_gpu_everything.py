"""All that a GPU is asked in one call: what is right, how long steps take, and what they launch.

Each part is a process of its own, so that one that fails takes no other with it; a part that does
not fit into the minutes that are left is named and left out. On a CPU (`dry`) everything runs at
tiny shapes, the kernels in Triton's interpreter, so that no minute of a GPU is lost to a mistake.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import _peers
import torch
from _common import write_csv
from _shapes import SHAPES
from _timing import Laps, print_table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

HERE = Path(__file__).parent
STEPS = [
    # shape, tokens, who, seconds that it takes at most
    ("1.1b", "4x512", "graft-qlora", 60),
    ("1.1b", "4x512", "graft-qlora+graphs", 60),
    ("1.1b", "4x512", "peft-qlora", 60),
    ("7b", "4x2048", "graft-qlora", 100),
    ("7b", "4x2048", "graft-qlora+graphs", 100),
    ("7b", "4x2048", "peft-qlora", 100),
    ("1.1b", "4x512", "graft-qalora", 60),
    ("1.1b", "4x512", "graft-qalora+graphs", 60),
]
DRY_STEPS = [("tiny", "2x16", who, 60) for who in ("graft-qlora", "graft-qlora+graphs")]
PEER = "peft-qlora"
WARM_UP, MEASURED = 4, 8
DRY_MEASURED = 1
TOGETHER = 0.02
"""What losses with and without a graph may differ by, relatively, after the same steps in bf16."""


class Everything:
    """Runs parts while there is time, and writes a table as soon as a part has rows for it."""

    def __init__(self, minutes: float, dry: bool, out: Path | None) -> None:
        self.end, self.dry, self.out = time.monotonic() + 60 * minutes, dry, out
        self.failed: list[str] = []

    def run(self) -> int:
        """Run everything; return how many parts failed."""
        print("\n".join(f"{name}: {value}" for name, value in environment().items()), flush=True)
        peer = _peers.missing("peft", "bitsandbytes")
        if peer is not None:
            print(f"without {PEER}: {peer}", flush=True)
        self.part("kernels", {"part": "kernels"}, 150)
        self.launches()
        self.steps(peer is None)
        self.one_token(peer is None)
        for name in self.failed:
            print(f"failed: {name}", flush=True)
        return len(self.failed)

    def part(self, name: str, task: dict[str, Any], seconds: float) -> Any:
        """Return what a process prints last, as JSON; None where it failed or there is no time."""
        left = self.end - time.monotonic()
        if left < seconds:
            print(f"left out: {name}: it may take {seconds} s, and {left:.0f} are left", flush=True)
            return None
        began, task = time.monotonic(), task | {"dry": self.dry}
        if self.dry and task["part"] != "kernels":
            found = do_part(task)  # here, which saves the imports
        else:
            command = [sys.executable, str(HERE / "gpu_step.py"), "--part", json.dumps(task)]
            output = self.process(name, command, seconds)
            found = None if output is None else json.loads(output.splitlines()[-1])
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        return found

    def process(self, name: str, command: list[str], seconds: float) -> str | None:
        """Run a process and show what it prints; None where it fails or takes too long."""
        environment = os.environ | ({"TRITON_INTERPRET": "1"} if self.dry else {})
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            self.failed.append(f"{name}: more than {seconds} s")
            return None
        print(done.stdout, end="", flush=True)
        if done.returncode:
            self.failed.append(f"{name}: {done.stderr.strip()[-1500:]}")
            return None
        return done.stdout

    def write(self, name: str, rows: list[dict[str, object]]) -> None:
        """Show a table and write it."""
        if not rows:
            return
        print_table(rows)
        path = write_csv(f"{name}-dry" if self.dry else name, rows)
        if self.out is not None:
            (self.out / path.name).write_bytes(path.read_bytes())

    # The parts ------------------------------------------------------------------------------------

    def launches(self) -> None:
        shape, tokens, _, _ = (DRY_STEPS if self.dry else STEPS)[0]
        rows = []
        for who in ("graft-qlora+graphs", "graft-qlora", "graft-qalora")[: 1 if self.dry else None]:
            task = {"part": "launches", "shape": shape, "tokens": tokens, "who": who}
            found = self.part(f"launches of {who}", task, 60)
            if found is not None:
                rows.append({"shape": shape, "tokens": tokens, "who": who, **found})
        self.write("gpu-launches", rows)

    def steps(self, with_peer: bool) -> None:
        rows: list[dict[str, object]] = []
        for shape, tokens, who, seconds in DRY_STEPS if self.dry else STEPS:
            if who == PEER and not with_peer:
                continue
            task = {"part": "step", "shape": shape, "tokens": tokens, "who": who}
            found = self.part(f"step {shape} {tokens} {who}", task, seconds)
            if found is None:
                continue
            measured = [1e3 * second for second in found["seconds"][WARM_UP:]]
            row: dict[str, object] = {"shape": shape, "tokens": tokens, "who": who}
            row |= {"ms": round(statistics.median(measured), 2), "fastest": round(min(measured), 2)}
            rows.append(row | {"peak GB": f"{found['peak'] / 1e9:.2f}", "loss": found["loss"]})
        for row in rows:
            self.compare(row, rows)
        self.write("gpu-everything-steps", rows)

    def compare(self, row: dict[str, object], rows: list[dict[str, object]]) -> None:
        """Add the time over the peer's; a graph's loss must be that without one."""

        def same(who: str) -> Any:
            case = (row["shape"], row["tokens"], who)
            return next((o for o in rows if (o["shape"], o["tokens"], o["who"]) == case), None)

        peer, who = same(PEER), str(row["who"])
        row["over peer"] = "" if peer is None else f"{float(str(row['ms'])) / peer['ms']:.3f}"
        eager = same(who.removesuffix("+graphs"))
        if who.endswith("+graphs") and eager is not None:
            off = abs(float(str(row["loss"])) / eager["loss"] - 1)
            if not off <= TOGETHER:
                self.failed.append(f"{who}: the loss is {row['loss']}, without {eager['loss']}")

    def one_token(self, with_peer: bool) -> None:
        if not self.dry:
            options = ["--tokens", "1", "16", "--turns", "5"]
            left = self.end - time.monotonic()
            if left > 30:
                script = [sys.executable, str(HERE / "triton_linear.py"), *options]
                self.process("one token", script, left)


def environment() -> dict[str, str]:
    """Return versions and the device."""
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "peft", "bitsandbytes", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


# What a part's process does -----------------------------------------------------------------------


def do_part(task: dict[str, Any]) -> Any:
    """Do one part; return what it found."""
    return _PARTS[task["part"]](**{name: value for name, value in task.items() if name != "part"})


def _kernels(dry: bool) -> bool:
    from _gpu_checks import failures

    failed = failures("cpu", 64, 17, False) if dry else failures("cuda", 2048, 512)
    if failed:
        raise ArithmeticError(f"kernels differ from the reference: {', '.join(failed)}")
    return True


def _step(dry: bool, shape: str, tokens: str, who: str) -> dict[str, Any]:
    laps = Laps()
    measured = DRY_MEASURED if dry else MEASURED
    loss = _training(dry, shape, tokens, who)(WARM_UP + measured, laps)
    if not torch.isfinite(torch.tensor(loss)):
        raise ArithmeticError(f"the loss is {loss}")
    peak = 0 if dry else torch.cuda.max_memory_allocated()
    return {"seconds": laps.seconds, "peak": peak, "loss": loss}


def _launches(dry: bool, shape: str, tokens: str, who: str) -> dict[str, Any]:
    """Return what the profiler sees of one step after the warm-up."""
    activities = [ProfilerActivity.CPU] + ([] if dry else [ProfilerActivity.CUDA])
    profiler = profile(activities=activities)

    class Profiled(Laps):
        def lap(self) -> None:
            super().lap()
            if len(self.seconds) == WARM_UP:
                profiler.start()
            elif len(self.seconds) == WARM_UP + 1:
                if not dry:
                    torch.cuda.synchronize()
                profiler.stop()

    _training(dry, shape, tokens, who)(WARM_UP + 1, Profiled())
    calls: Counter[str] = Counter()
    busy = 0.0
    kernels = 0
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels += 1
            busy += event.time_range.elapsed_us()
        else:
            calls[event.name] += 1
    launched = sum(n for name, n in calls.items() if "LaunchKernel" in name)
    return {
        "launches": launched,
        "graphs": calls["cudaGraphLaunch"],
        "copies": sum(n for name, n in calls.items() if name.startswith("cudaMemcpy")),
        "waits": sum(n for name, n in calls.items() if "Synchronize" in name),
        "on the device": kernels,
        "busy ms": round(busy / 1e3, 2),
        "PyTorch's operations": sum(n for name, n in calls.items() if name.startswith("aten::")),
    }


def _training(dry: bool, shape: str, tokens: str, who: str) -> Callable[[int, Laps], float]:
    from _training import graft_training, peft_training

    batch, length = map(int, tokens.split("x"))
    side, _, method = who.partition("-")
    method, _, graphs = method.partition("+")
    torch.manual_seed(0)
    with torch.device("cpu" if dry else "cuda"):
        ids = torch.randint(SHAPES[shape].vocabulary, (batch, length))
        if side == "peft":
            return peft_training(SHAPES[shape], method, "none", ids)
        train = graft_training(SHAPES[shape], method, "none", ids, cuda_graphs=bool(graphs))
    return _replaying(train) if dry and graphs else train


def _replaying(train: Callable[[int, Laps], float]) -> Callable[[int, Laps], float]:
    """Return a training that computes anew where a GPU would replay a graph."""

    def record(run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        recorded = run()

        def replay() -> None:
            for to, of in zip(tree_leaves(recorded), tree_leaves(run()), strict=True):
                if isinstance(to, Tensor):
                    to.copy_(of)

        return recorded, replay

    def run(steps: int, laps: Laps) -> float:
        with ExitStack() as stack:
            stack.enter_context(mock.patch("graft.train.graphs.recorder", lambda device: record))
            return train(steps, laps)

    return run


_PARTS: dict[str, Callable[..., Any]] = {"kernels": _kernels, "step": _step, "launches": _launches}
