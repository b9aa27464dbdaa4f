"""How much memory this process uses, and how the C library keeps what is freed."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of mallopt, in glibc's malloc.h
_LARGEST_REUSED = 64 * 2**20
SPARING_REUSED = 2 * 2**20
"""The largest buffer that is kept for the next one where memory is short. Larger ones go back to
the system, so that none of them leaves a gap behind that the next does not fit into."""
_NEVER = 2**31 - 1
_MEMINFO = Path("/proc/meminfo")


def reuse_freed_memory(sparing: bool = False) -> bool:
    """Let the C library keep freed buffers for the next ones; return whether it can be told to.

    A training step frees and takes the same large buffers over and over. By default glibc maps each
    anew, and the page faults of a fresh mapping cost more than the arithmetic on it. Buffers of
    more than 64 MiB still go back to the system; `sparing`, those of more than SPARING_REUSED do,
    which costs a few per cent of a step's time and leaves a quarter of the gaps.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    largest = SPARING_REUSED if sparing else _LARGEST_REUSED
    settings = (_MMAP_THRESHOLD, largest), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, 16 * 2**20)
    return all([mallopt(option, value) == 1 for option, value in settings])


def give_back_freed(device: torch.device) -> None:
    """Let the system have what was freed, gaps included; what is in use stays as it is.

    Buffers that are larger than all before fit into no gap: without this they would come on top of
    what the gaps hold.
    """
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def resident_bytes(device: torch.device) -> int:
    """Return the memory in use now: of the GPU for a CUDA device, else of the process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_bytes(device)


def peak_bytes(device: torch.device) -> int:
    """Return the largest memory use so far: of the GPU for a CUDA device, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not ru_maxrss where there is something better: it begins with what the parent process used.
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024 * int(lines["VmHWM"].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that a run on the device could take now; None for another machine's GPU.

    Of the CPU's it is what Linux calls available, elsewhere all that there is.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] if torch.cuda.is_available() else None
    if device.type == "mps" and not torch.backends.mps.is_available():
        return None
    if _MEMINFO.is_file():
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def forget_peak(device: torch.device) -> None:
    """Let `peak_bytes` count from now on, where the system can (CUDA, Linux).

    What was freed goes back to the system first: a process that trains several times would else
    report each time the largest of all so far.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    give_back_freed(device)
    with suppress(OSError):  # not there, or not ours to write
        Path("/proc/self/clear_refs").write_text("5")  # of proc(5): VmHWM is what is resident now
