"""Ways to compute x Wᵀ with one weight, dense and in 4 bits, by graft and by its peers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import _peers
import torch
from _timing import Rotation
from torch import Tensor
from torch.nn.functional import linear

from graft.formats.base import WeightFormat, storage_bytes
from graft.formats.registry import make_format
from graft.layers.frozen import FrozenLinear

NF4: WeightFormat = make_format("nf4", {"double_quant": True})
INT4: WeightFormat = make_format("int", {"bits": 4, "group_size": 32})
GRAFT = {"graft nf4": NF4, "graft int4": INT4}

FUSED = "bitsandbytes fused"

_ROTATED_BYTES = 160e6
_MOST_COPIES = 32
_MOST_ERROR = 0.15
"""Of a 4-bit product against the dense one; NF4 has about 0.09 and INT4 0.06 on normal weights."""


@dataclass(frozen=True)
class Candidate:
    """A way to compute x Wᵀ, each call on the next copy of the weight."""

    call: Callable[[Tensor], Tensor]
    packed_bytes: int
    differentiable: bool = True


def candidates(weight: Tensor) -> dict[str, Candidate]:
    """Return every candidate for the weight's dtype; those that compute in bf16 alone only there.

    PyTorch's int4pack takes fp32 too, but is a hundred times slower in it.
    """
    made = {"dense": _rotating(weight, Tensor.clone, weight.nbytes, linear)}
    for name, weight_format in GRAFT.items():
        made[name] = _graft(weight_format, weight)
    if _peers.missing("bitsandbytes") is None:
        nf4_bytes = storage_bytes(NF4, *weight.shape)
        made["bitsandbytes"] = _rotating(
            _peers.bitsandbytes_quantise(weight),
            _peers.bitsandbytes_copy,
            nf4_bytes,
            _peers.bitsandbytes_linear,
        )
        if weight.dtype == torch.bfloat16:
            layers = _peers.bitsandbytes_fused_layers(weight, copies(nf4_bytes))
            if layers is not None:
                made[FUSED] = _fused(Rotation(layers), weight)
    if weight.dtype == torch.bfloat16:
        made["int4pack"] = _int4pack(weight)
    return made


def copies(packed_bytes: int) -> int:
    """Return how many copies of a weight rotate, so that together they are no cache's size."""
    return min(_MOST_COPIES, max(2, math.ceil(_ROTATED_BYTES / packed_bytes)))


def check(made: Mapping[str, Candidate], weight: Tensor) -> None:
    """Raise ArithmeticError when a candidate does not compute what it is timed for."""
    x = torch.randn(16, weight.shape[1], dtype=weight.dtype)
    with torch.no_grad():
        expected = linear(x, weight).float()
        for name, candidate in made.items():
            error = (candidate.call(x).float() - expected).norm() / expected.norm()
            if not error < _MOST_ERROR:
                raise ArithmeticError(f"{name} differs from the dense product by {error:.2f}")


def _rotating(
    first: Any,
    copy: Callable[[Any], Any],
    packed_bytes: int,
    compute: Callable[[Tensor, Any], Tensor],
    differentiable: bool = True,
) -> Candidate:
    rotation = Rotation([first, *(copy(first) for _ in range(copies(packed_bytes) - 1))])
    return Candidate(lambda x: compute(x, rotation()), packed_bytes, differentiable)


def _graft(weight_format: WeightFormat, weight: Tensor) -> Candidate:
    shape = weight.shape[1], weight.shape[0]
    return _rotating(
        FrozenLinear(*shape, weight_format, weight_format.pack(weight)),
        lambda layer: layer.replaced(weight_format, copy_packed(layer.packed)),
        storage_bytes(weight_format, *weight.shape),
        lambda x, layer: layer(x),
    )


def copy_packed(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy of packed tensors in memory of its own."""
    return {name: tensor.clone() for name, tensor in packed.items()}


def _fused(rotation: Rotation, weight: Tensor) -> Candidate:
    # Codes, and bf16 statistics for blocks of 64.
    packed_bytes = weight.numel() // 2 + weight.numel() // 32
    return Candidate(lambda x: rotation()(x), packed_bytes, differentiable=False)


def _int4pack(weight: Tensor) -> Candidate:
    packed = _peers.int4pack(weight, 32)
    return _rotating(
        packed,
        lambda one: (one[0].clone(), one[1].clone()),
        packed[0].nbytes + packed[1].nbytes,
        lambda x, one: _peers.int4pack_linear(x, one, 32),
        differentiable=False,
    )
