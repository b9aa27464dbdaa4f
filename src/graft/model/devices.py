"""Where and in what precision a model computes on this machine."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from graft.errors import GraftError


def resolve_device(name: str) -> torch.device:
    """Return the device for 'auto', 'cpu', 'cuda' or 'mps'; raises GraftError if it is not here."""
    devices = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    available = [device for device, usable in devices.items() if usable]
    if name == "auto":
        return torch.device(available[0])
    if name not in available:
        raise GraftError(f"device {name!r} is not available here; there is: {', '.join(available)}")
    return torch.device(name)


def resolve_dtype(name: str, source: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the compute dtype for 'auto', 'exact', 'stored', 'float32' or 'bfloat16'.

    auto keeps a float32 checkpoint in float32; a 16-bit one computes in bfloat16 where the machine
    has instructions for it, else in float32. exact is auto, except that a float16 checkpoint, whose
    weights bfloat16 does not hold, computes in float32. stored is for a model that computes
    nothing: the source's own dtype.
    """
    narrow = (torch.float16, torch.bfloat16)
    if name == "stored":
        return source if source in narrow else torch.float32
    if name == "exact":
        name = "float32" if source is torch.float16 else "auto"
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if source in (torch.float32, torch.float64):
        return torch.float32
    return torch.bfloat16 if computes_bfloat16(device) else torch.float32


def dtype_note(source: torch.dtype, computed: torch.dtype) -> str | None:
    """Return in words what a dtype of computation takes from the weights, None where nothing."""
    if (source, computed) != (torch.float16, torch.bfloat16):
        return None
    return (
        "the weights are float16 and become bfloat16 here, which holds three bits less of each; "
        "--dtype float32 keeps them"
    )


def computes_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and not _cpu_flags().isdisjoint({"avx512_bf16", "amx_bf16"})


@cache
def _cpu_flags() -> frozenset[str]:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return frozenset()
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())
