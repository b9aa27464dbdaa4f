"""What graft finds on this machine: kernels, processor, memory, GPUs, versions."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import graft.kernels.backends  # noqa: F401  (registers them)
from graft.kernels.backend.native_library import instructions
from graft.kernels.backend.registry import Backend, backends
from graft.model.devices import computes_bfloat16

Diagnosis = dict[str, dict[str, Any]]
"""Facts by section and name, as plain JSON values; sizes in bytes; None is not known or not so."""

_PACKAGE = "graft-llm"
_VERSIONS = ("torch", "transformers", "tokenizers", "safetensors", "triton")
_INSTRUCTION_SETS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "avx512vbmi",
    "amx_bf16",
    "amx_int8",
    "asimd",  # what /proc/cpuinfo calls NEON
    "asimddp",
    "sve",
    "bf16",
)
_MALLOC_SETTINGS = re.compile(r"MALLOC_.*|GLIBC_TUNABLES|LD_PRELOAD|DYLD_INSERT_LIBRARIES")
_PROC = Path("/proc")
_SYS = Path("/sys")


def diagnose() -> Diagnosis:
    """Return what graft finds on this machine; takes as long as importing PyTorch."""
    return {
        "versions": _versions(),
        "kernels": _kernels(),
        "processor": _processor(),
        "memory": _memory(),
        "gpu": _gpus(),
        "extras": _extras(),
    }


def _versions() -> dict[str, Any]:
    found = {name: _version(name) for name in _VERSIONS}
    found["torch"] = str(torch.__version__)  # which says the build too
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    python = f"{platform.python_version()} ({sys.executable})"
    return {"graft": _version(_PACKAGE), "python": python, **found, "system": system}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# Kernels ------------------------------------------------------------------------------------------


def _kernels() -> dict[str, Any]:
    """Return which backend computes on each device, and what there is to say of each backend."""
    devices = _device_types()
    facts: dict[str, Any] = {f"on {device}": _active(device) for device in devices}
    for backend in backends():
        reason = backend.why_unavailable()
        state = "available" if reason is None else f"not available: {reason}"
        if reason is None and not any(_computes(backend, device) for device in devices):
            state = f"available, for {_names(backend)}, of which there is none here"
        facts[backend.name] = f"{state} (computes on {_names(backend)})"
    facts["native instructions"] = instructions()
    return facts


def _device_types() -> list[str]:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return ["cpu", *(device for device, is_there in there.items() if is_there)]


def _active(device: str) -> str:
    """Return which backends compute how many of the operations on a device."""
    usable = [b for b in backends() if _computes(b, device) and b.why_unavailable() is None]
    operations = {operation for backend in backends() for operation in backend.operations}
    taken = Counter(
        next((backend.name for backend in usable if operation in backend.operations), "nothing")
        for operation in operations
    )
    (first, most), *others = taken.most_common()
    rest = "".join(f", {name} for {count}" for name, count in others)
    return first if not others else f"{first} for {most} operations{rest}"


def _computes(backend: Backend, device: str) -> bool:
    return backend.device_types is None or device in backend.device_types


def _names(backend: Backend) -> str:
    return "every device" if backend.device_types is None else "/".join(backend.device_types)


# The machine --------------------------------------------------------------------------------------


def _processor() -> dict[str, Any]:
    cpuinfo = _keys(_PROC / "cpuinfo")
    flags = (cpuinfo.get("flags") or cpuinfo.get("Features") or "").split()
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else None
    bfloat16 = computes_bfloat16(torch.device("cpu"))
    return {
        "model": cpuinfo.get("model name") or platform.processor() or None,
        "cores": os.cpu_count(),
        "cores that this process may use": usable,
        "threads of PyTorch": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "instruction sets": [name for name in _INSTRUCTION_SETS if name in flags] or None,
        "PyTorch's instructions": torch.backends.cpu.get_cpu_capability(),
        "multiplies bfloat16 in hardware": bfloat16,
        "16-bit models compute in": "bfloat16" if bfloat16 else "float32",
    }


def _memory() -> dict[str, Any]:
    meminfo = {key: 1024 * int(text.split()[0]) for key, text in _keys(_PROC / "meminfo").items()}
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    library, version = platform.libc_ver()
    settings = {key: text for key, text in os.environ.items() if _MALLOC_SETTINGS.fullmatch(key)}
    chosen = re.search(r"\[(\w+)\]", _text(_SYS / "kernel/mm/transparent_hugepage/enabled"))
    limit = _text(_SYS / "fs/cgroup/memory.max").strip()
    return {
        "total bytes": meminfo.get("MemTotal", pages),
        "available bytes": meminfo.get("MemAvailable"),
        "limit of the control group, bytes": int(limit) if limit.isdecimal() else None,
        "swap bytes": meminfo.get("SwapTotal"),
        "C library": f"{library} {version}".strip() or None,
        # Only glibc's malloc can be told to keep what is freed; see model/running/memory.py.
        "keeps freed buffers while training": library == "glibc",
        "malloc settings in the environment": settings or None,
        "transparent huge pages": chosen.group(1) if chosen else None,
    }


def _gpus() -> dict[str, Any]:
    facts: dict[str, Any] = {
        "CUDA of PyTorch": torch.version.cuda,
        "ROCm of PyTorch": torch.version.hip,
        "MPS": torch.backends.mps.is_available(),
    }
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        facts[f"cuda:{index}"] = {
            "name": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "total bytes": total,
            "available bytes": free,
        }
    return facts


def _extras() -> dict[str, Any]:
    """Return for each extra of the package its packages' installed versions."""
    found: dict[str, Any] = {}
    for requirement in metadata.requires(_PACKAGE) or ():
        needed = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", requirement)
        if needed and extra:
            name = needed.group()
            found.setdefault(extra.group(1), {})[name] = _version(name)
    return found


def _keys(path: Path) -> dict[str, str]:
    """Return the first value of each key in a file of lines 'key: value'."""
    found: dict[str, str] = {}
    for line in _text(path).splitlines():
        key, colon, value = line.partition(":")
        if colon:
            found.setdefault(key.strip(), value.strip())
    return found


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
