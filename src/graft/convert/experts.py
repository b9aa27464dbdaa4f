"""Experts that a checkpoint holds one by one, and the model as one tensor for all of them.

Transformers keeps OWNER.gate_up_proj [experts, 2 intermediate, hidden] and OWNER.down_proj
[experts, hidden, intermediate]; most files have OWNER.0.gate_proj.weight and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial, reduce

import torch
from torch import Tensor, nn

from graft.convert.source import (
    DenseLayer,
    PlainTensor,
    QuantisedLayer,
    ReadLayer,
    Source,
    of_layer,
)
from graft.errors import GraftError

_NAMES = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""What stands below each other in the fused tensor, under the names that families have for it."""


@dataclass(frozen=True)
class _Part:
    """One expert's matrix: what reads it, and what the file holds where that is quantised."""

    make: Callable[[], Tensor]
    dtype: torch.dtype = torch.float32
    quantisation: str = ""


def with_experts(source: Source) -> Source:
    """Return the source with fused experts, where it holds those of the model one by one.

    Raises GraftError where some of them are missing, or have other sizes.
    """
    layers, tensors = dict(source.layers), dict(source.tensors)
    for name, fused in source.model.state_dict().items():
        owner, _, last = name.rpartition(".")
        if last not in _NAMES or fused.dim() != 3 or name in tensors:
            continue
        for parts in _NAMES[last]:
            names = [[f"{owner}.{i}.{part}" for part in parts] for i in range(len(fused))]
            if not any(_holds(source, key) for row in names for key in row):
                continue
            _check_layout(name, source.model.get_submodule(owner))
            shape = fused.shape[1] // len(parts), fused.shape[2]
            rows = [[_part(source, key, shape) for key in row] for row in names]
            kinds = {part.quantisation for row in rows for part in row}
            words = " and ".join(sorted(kinds - {""}))
            dtype = reduce(torch.promote_types, {part.dtype for row in rows for part in row})
            make = partial(_stacked, rows, tuple(fused.shape), dtype)
            tensors[name] = PlainTensor(tuple(fused.shape), dtype, make, words)
            for key in (key for row in names for key in row):
                layers.pop(key, None)
                tensors.pop(f"{key}.weight", None)
    return replace(source, layers=layers, tensors=tensors)


def _holds(source: Source, key: str) -> bool:
    return key in source.layers or f"{key}.weight" in source.tensors


def _check_layout(name: str, owner: nn.Module) -> None:
    """Raise GraftError where the model's own tensor is no stack of the matrices."""
    if getattr(owner, "is_transposed", False) or not getattr(owner, "is_concatenated", True):
        raise GraftError(
            f"{name} is laid out in a way that graft does not make of single experts; start from "
            "a checkpoint whose experts are fused"
        )


def _part(source: Source, key: str, shape: tuple[int, int]) -> _Part:
    read, plain = source.layers.get(key), source.tensors.get(f"{key}.weight")
    if read is not None:
        return _read(key, read, shape)
    if plain is None:
        raise GraftError(f"tensor {key}.weight is missing")
    if plain.shape != shape:
        raise GraftError(f"{key}.weight has shape {list(plain.shape)}; expected {list(shape)}")
    return _Part(plain.make, plain.dtype, plain.quantisation)


def _read(key: str, read: ReadLayer, shape: tuple[int, int]) -> _Part:
    with of_layer(key):
        layer = read(*shape)
    if isinstance(layer, DenseLayer):
        return _Part(_named(key, layer.make), quantisation=layer.quantisation)
    make = partial(_unpacked, layer, shape)
    return _Part(_named(key, make), quantisation=layer.weight_format.words())


def _named(key: str, make: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def named() -> Tensor:
        with of_layer(key):
            return make()

    return named


def _unpacked(layer: QuantisedLayer, shape: tuple[int, int]) -> Tensor:
    return layer.weight_format.unpack(layer.make(), *shape, torch.float32)


def _stacked(rows: list[list[_Part]], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return all experts in one tensor; one matrix more is in memory at a time."""
    whole = torch.empty(shape, dtype=dtype)
    for expert, row in zip(whole, rows, strict=True):
        for place, part in zip(_halves(expert, len(row)), row, strict=True):
            place.copy_(part.make())
    return whole


def _halves(expert: Tensor, count: int) -> Iterator[Tensor]:
    yield from expert.chunk(count)
