"""The Triton backend: whether it is there, and how its kernels are launched."""

from __future__ import annotations

import importlib.util
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from graft.kernels.backend.registry import Backend, register_backend


@cache
def _why_unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm, where the kernels are not tested"
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = min(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))
    if capability < (8, 0):
        return "needs compute capability 8.0, a GPU here has {}.{}".format(*capability)
    return None


triton = register_backend(
    Backend(
        name="triton",
        priority=20,
        device_types=frozenset({"cuda"}),
        why_unavailable=_why_unavailable,
    )
)


@cache
def _kernels() -> ModuleType:
    """Import the kernels on first use: this module itself is imported without triton too."""
    from graft.kernels import triton_kernels

    return triton_kernels


def launch(
    kernel: str, grid: tuple[int, ...], out: Tensor, *arguments: Any, **options: Any
) -> None:
    """Run a kernel on out's device.

    A fused multiply-add would skip the rounding of a product that the reference rounds, which
    shows where a statistic is a full float32 number.
    """
    with torch.cuda.device_of(out):
        getattr(_kernels(), kernel)[grid](out, *arguments, **options, enable_fp_fusion=False)


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the kernels multiply; anything else (float64) is left to PyTorch."""
STATISTICS = (torch.float16, torch.float32)
"""What scales and offsets are stored in."""


def as_matrix(x: Tensor) -> Tensor:
    """Return x [..., features] as the contiguous matrix [tokens, features]."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def tiles(count: int, size: int) -> int:
    """Return how many tiles of that size hold the count."""
    return -(-count // size)


def as_stored(*packed: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return packed tensors as they lie on disk, which is how the kernels read them."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in packed)
