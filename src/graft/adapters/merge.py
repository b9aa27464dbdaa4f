"""Folding adapters into the frozen weight, with the error that the fold costs measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from graft.adapters.base import AdaptedLinear
from graft.formats.base import WeightFormat
from graft.formats.dense import DenseFormat
from graft.formats.linear import FrozenLinear


@dataclass(frozen=True)
class MergeError:
    """How far the merged weight is from the weight that the adapted layer computed with."""

    max_abs: float
    """Largest |merged - trained|, in the weight's units."""
    relative_to_update: float
    """RMS of merged - trained over RMS of trained - base; 0 when nothing was trained and lost."""
    exact: bool
    """Every element of the merged weight equals the trained one."""

    def as_dict(self) -> dict[str, float | bool]:
        """Return the figures by name."""
        return asdict(self)


@dataclass(frozen=True)
class MergeResult:
    """The merged layer and its measured error."""

    layer: FrozenLinear
    error: MergeError


def merge(layer: AdaptedLinear, target: WeightFormat | None = None) -> MergeResult:
    """Fold the active adapters into a new frozen layer; the adapted layer is left as it is.

    With target None the result is exact wherever it can be: grid adapters alone keep the base's
    format with moved statistics; anything else becomes dense float32. A given target is packed
    to, rounding the update with the weight, and the error says what that costs.
    """
    with torch.no_grad():
        trained = layer.effective_weight()
        packed = _exact_packed(layer, target)
        if packed is None:
            weight_format = target or DenseFormat("float32")
            packed = weight_format.pack(trained.float())
        else:
            weight_format = layer.base.weight_format
        merged = layer.base.replaced(weight_format, packed)
        _add_bias(merged, layer)
        base_weight = layer.base.dense_weight(torch.float32).double()
        return MergeResult(merged, _measure(merged, trained, base_weight))


def _exact_packed(layer: AdaptedLinear, target: WeightFormat | None) -> dict[str, Tensor] | None:
    """Return packed tensors of the base's own format that hold the update exactly, if they can."""
    if target is not None and target != layer.base.weight_format:
        return None
    packed = layer.effective_packed()
    if any(adapter.grid_update(packed) is None for adapter in layer.active_adapters()):
        return None
    specs = layer.base.weight_format.storage(layer.base.out_features, layer.base.in_features)
    return {name: packed[name].detach().to(spec.dtype) for name, spec in specs.items()}


def _add_bias(merged: FrozenLinear, layer: AdaptedLinear) -> None:
    updates = [adapter.delta_bias() for adapter in layer.active_adapters()]
    moves = [update for update in updates if update is not None]
    if moves:
        old = torch.zeros_like(moves[0]) if merged.bias is None else merged.bias.double()
        dtype = torch.float32 if merged.bias is None else merged.bias.dtype
        merged.bias = torch.nn.Parameter(sum(moves, old).to(dtype), requires_grad=False)


def _measure(merged: FrozenLinear, trained: Tensor, base: Tensor) -> MergeError:
    lost = merged.dense_weight(torch.float32).double() - trained
    update_rms = (trained - base).square().mean().sqrt().item()
    lost_rms = lost.square().mean().sqrt().item()
    relative = lost_rms / update_rms if update_rms > 0 else (0.0 if lost_rms == 0 else float("inf"))
    return MergeError(
        max_abs=lost.abs().max().item(),
        relative_to_update=relative,
        exact=not bool(lost.any()),
    )
