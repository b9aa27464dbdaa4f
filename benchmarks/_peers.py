"""The peers' single layers: bitsandbytes on NF4, and PyTorch's int4pack.

Importing this module imports torch alone; a peer is imported by the functions that need it.
"""

from __future__ import annotations

import copy
import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn


def missing(*packages: str) -> str | None:
    """Return why peers cannot run, or None when all their packages are installed."""
    absent = [package for package in packages if find_spec(package) is None]
    if not absent:
        return None
    return f"{', '.join(absent)} not installed; pip install 'graft-llm[peers]'"


def bitsandbytes() -> Any:
    """Return the package."""
    # It warns that a kernel from the hub is not there; its own fused kernel is the one measured.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes


def bitsandbytes_quantise(weight: Tensor) -> tuple[Tensor, Any]:
    """Return nf4 codes and statistics, doubly quantised, in blocks of 64."""
    functional = bitsandbytes().functional
    packed: tuple[Tensor, Any] = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    return packed


def bitsandbytes_copy(packed: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    """Return a copy of codes and statistics in memory of its own."""
    return packed[0].clone(), copy.deepcopy(packed[1])


def bitsandbytes_dequantise(packed: tuple[Tensor, Any]) -> Tensor:
    """Return the weight, in the dtype that it was quantised from."""
    weight: Tensor = bitsandbytes().functional.dequantize_4bit(*packed)
    return weight


def bitsandbytes_linear(x: Tensor, packed: tuple[Tensor, Any]) -> Tensor:
    """Return x Wᵀ through the training path, differentiable in x."""
    y: Tensor = bitsandbytes().matmul_4bit(x, packed[0], quant_state=packed[1])
    return y


def bitsandbytes_fused_layers(weight: Tensor, count: int) -> list[nn.Module] | None:
    """Return layers in evaluation mode, repacked for the fused kernel; None without that kernel."""
    bnb = bitsandbytes()
    out_features, in_features = weight.shape
    layer = bnb.nn.Linear4bit(
        in_features, out_features, bias=False, compute_dtype=weight.dtype, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", module=layer
    )
    layer.to("cpu").eval()
    with torch.no_grad():
        layer(torch.ones(1, in_features, dtype=weight.dtype))  # the first call repacks
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        return None
    return [layer, *(copy.deepcopy(layer) for _ in range(count - 1))]


def int4pack(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return PyTorch's packed int4 weight and its bf16 scales and zeros, rounded to nearest.

    A code q stands for (q - 8) * scale + zero.
    """
    groups = weight.float().unflatten(-1, (-1, group_size))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low).clamp(min=1e-8) / 15
    codes = ((groups - low) / scale).round().clamp(0, 15).flatten(-2).int()
    statistics = torch.cat([scale, low + 8 * scale], -1).transpose(0, 1).contiguous().bfloat16()
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), statistics


def int4pack_linear(x: Tensor, packed: tuple[Tensor, Tensor], group_size: int) -> Tensor:
    """Return x Wᵀ; x bf16 [tokens, in_features]."""
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed[0], group_size, packed[1])
    return y
