"""How much memory this process uses."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch


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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
