"""How the benchmarks measure: fresh processes, interleaved turns, other load, floors, verdicts.

A floor is the least time that a piece of work can take on this machine: the bytes that it must
read over the read bandwidth, or its operations over the peak of the library's own dense product,
whichever is longer; both limits are measured in the same run.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OTHER_LOAD_LIMIT = 0.1
"""Cores used by other processes above which a measurement is repeated, and flagged if it stays."""

TUNED_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
"""glibc keeps freed memory, however large the buffer, instead of handing it back to the kernel, so
that the next buffer of that size costs no page faults."""

SETTINGS = ("default", "tuned")


# Fresh processes ----------------------------------------------------------------------------------


class ChildError(RuntimeError):
    """A measuring process that did not end well."""


def run_child(script: str, task: Mapping[str, Any], setting: str = "default") -> Any:
    """Run `script --child <task as JSON>` in a fresh process and return the JSON that it printed.

    `setting` chooses glibc's malloc: as it comes ("default") or `TUNED_MALLOC` ("tuned"). Raises
    ChildError with the end of its standard error when the process fails.
    """
    environment = {key: text for key, text in os.environ.items() if key not in TUNED_MALLOC}
    if setting == "tuned":
        environment |= TUNED_MALLOC
    command = [sys.executable, script, "--child", json.dumps(task)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ChildError(f"exit status {done.returncode}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# Other load ---------------------------------------------------------------------------------------


class OtherLoad:
    """Cores that other processes use, from /proc/stat minus this process, since it was made.

    Time stolen by the hypervisor counts as other load.
    """

    def __init__(self) -> None:
        self.begin = self._now()

    def cores(self) -> float:
        """Return the other processes' CPU seconds per second."""
        busy, own, clock = (now - then for now, then in zip(self._now(), self.begin, strict=True))
        return max(0.0, (busy - own) / clock) if clock else 0.0

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Return seconds (of all cores busy, of this process, of the clock)."""
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        user, nice, system, _, _, irq, softirq, steal = (int(ticks) for ticks in fields[1:9])
        ticks = user + nice + system + irq + softirq + steal
        usage = resource.getrusage(resource.RUSAGE_SELF)
        own = usage.ru_utime + usage.ru_stime
        return ticks / os.sysconf("SC_CLK_TCK"), own, time.perf_counter()


# Interleaved turns --------------------------------------------------------------------------------


@dataclass
class Turns:
    """Seconds per call of each candidate, one number a turn, and the other load meanwhile."""

    seconds: dict[str, list[float]]
    other: float


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    turns: int = 9,
    turn_seconds: float = 0.02,
    attempts: int = 3,
) -> Turns:
    """Time the candidates in turn, A B C A B C ...; a turn repeats quick calls to turn_seconds.

    When other processes use more than OTHER_LOAD_LIMIT cores meanwhile, everything is measured
    again, up to `attempts` times, and the attempt with the least other load counts.
    """
    calls = {}
    for name, call in candidates.items():
        for _ in range(2):
            begin = time.perf_counter()
            call()
            once = time.perf_counter() - begin
        calls[name] = max(1, round(turn_seconds / once))
    best: Turns | None = None
    for _ in range(attempts):
        load = OtherLoad()
        seconds: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(turns):
            for name, call in candidates.items():
                begin = time.perf_counter()
                for _ in range(calls[name]):
                    call()
                seconds[name].append((time.perf_counter() - begin) / calls[name])
        other = load.cores()
        if best is None or other < best.other:
            best = Turns(seconds, other)
        if other <= OTHER_LOAD_LIMIT:
            break
    assert best is not None
    return best


class Rotation:
    """Hands out the items in turn, so that no item is still in the cache when it comes again."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items, self.next_item = items, 0

    def __call__(self) -> Any:
        self.next_item = (self.next_item + 1) % len(self.items)
        return self.items[self.next_item]


@dataclass(frozen=True)
class Summary:
    """Median, minimum and spread of a sample, in the sample's unit."""

    median: float
    minimum: float
    spread: float
    """Interquartile range over the median."""
    count: int


def summarise(sample: Sequence[float]) -> Summary:
    """Return the summary of a sample."""
    median = statistics.median(sample)
    low, _, high = statistics.quantiles(sample, n=4) if len(sample) > 1 else (median,) * 3
    spread = (high - low) / median if median else 0.0
    return Summary(median, min(sample), spread, len(sample))


# Steps and memory ---------------------------------------------------------------------------------


@dataclass
class Laps:
    """What each training step took, from one call of `lap` to the next."""

    seconds: list[float] = field(default_factory=list)
    minor_faults: list[int] = field(default_factory=list)
    other: list[float] = field(default_factory=list)

    def start(self) -> None:
        """Begin a lap, forgetting what went before."""
        self._load = OtherLoad()
        self._faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        self._begin = time.perf_counter()

    def lap(self) -> None:
        """End a lap and begin the next."""
        self.seconds.append(time.perf_counter() - self._begin)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        self.minor_faults.append(faults - self._faults)
        self.other.append(self._load.cores())
        self.start()


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """Return the largest resident memory of this process since `forget_peak`."""
    return _status_bytes("VmHWM")


def forget_peak() -> None:
    """Set the kernel's high-water mark of this process back to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def give_back_freed() -> None:
    """Have glibc hand its free memory back to the kernel."""
    ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no {key}")


# Limits and verdicts ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What the machine can do at most, as measured."""

    read: float
    """Bytes per second that a sum over a large int64 tensor reads."""
    bfloat16: float
    """Operations per second of F.linear in bf16 at 1024 tokens, 4096 x 4096."""
    float32: float
    """The same in fp32, through the faster one of MKL and oneDNN."""

    def floor(self, operations: float, read_bytes: float, dtype: str = "bfloat16") -> float:
        """Return the seconds that the work takes at least."""
        peak = self.bfloat16 if dtype == "bfloat16" else self.float32
        return max(operations / peak, read_bytes / self.read)

    def describe(self) -> str:
        """Return one line."""
        return (
            f"limits: read {self.read / 1e9:.1f} GB/s, "
            f"bf16 {self.bfloat16 / 1e9:.0f} GFLOP/s, fp32 {self.float32 / 1e9:.0f} GFLOP/s"
        )


def measure_limits(features: int = 4096, tokens: int = 1024, megabytes: int = 512) -> Limits:
    """Measure the limits: the best of several turns, as a limit is what is never beaten."""
    import torch
    from torch.nn.functional import linear

    numbers = torch.ones(megabytes << 17, dtype=torch.int64)
    x, weight = torch.randn(tokens, features), torch.randn(features, features)
    x16, weight16 = x.bfloat16(), weight.bfloat16()
    candidates: dict[str, Callable[[], object]] = {
        "read": numbers.sum,
        "bfloat16": lambda: linear(x16, weight16),
        "MKL": lambda: linear(x, weight),
    }
    if torch.backends.mkldnn.is_available():
        x_onednn, weight_onednn = x.to_mkldnn(), weight.to_mkldnn()
        candidates["oneDNN"] = lambda: torch.ops.aten.mkldnn_linear(x_onednn, weight_onednn, None)
    measured = interleave(candidates, turns=5, attempts=2).seconds
    best = {name: min(seconds) for name, seconds in measured.items()}
    operations = 2 * tokens * features * features
    float32 = min(best["MKL"], best.get("oneDNN", best["MKL"]))
    return Limits(
        read=numbers.numel() * 8 / best["read"],
        bfloat16=operations / best["bfloat16"],
        float32=operations / float32,
    )


def best_limits(measured: Sequence[Mapping[str, float]]) -> Limits:
    """Return the highest of limits that were measured several times, given as dictionaries."""
    return Limits(**{name: max(one[name] for one in measured) for name in asdict(Limits(0, 0, 0))})


def verdict(seconds: float, target: float | None, floor: float) -> str:
    """Return ok or miss; where the target lies under the floor, 90 % of the floor's rate is ok."""
    if target is None:
        return ""
    if seconds <= target:
        return "ok"
    if target < floor:
        return "at floor" if seconds <= floor / 0.9 else "miss, under floor"
    return "miss"


def load_text(other: float) -> str:
    """Return other load in cores, flagged when it is too much."""
    return f"{other:.2f}" + ("!" if other > OTHER_LOAD_LIMIT else "")


def print_table(rows: Sequence[Mapping[str, object]]) -> None:
    """Print rows that share their keys as aligned columns."""
    header = list(rows[0])
    lines = [header, *([str(row[key]) for key in header] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        cells = (text.ljust(width) for text, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())
    print(flush=True)
