"""Which frozen layers of a model round their inputs, and how."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from graft.errors import GraftError
from graft.formats.base import WeightFormat
from graft.layers.config import Activations
from graft.layers.frozen import FrozenLinear


def compute_with(model: nn.Module, activations: Activations) -> None:
    """Let every layer of integer weights, now or later, round what it meets."""
    for layer in _layers(model):
        layer.activations = activations


def check_activations(activations: Activations | None, formats: Iterable[WeightFormat]) -> None:
    """Raise GraftError where inputs are to be rounded and no weights are integers of that kind."""
    if activations in (None, "float") or any(one.meets_rounded for one in formats):
        return
    raise GraftError(
        f"--activations {activations} is for weights that are integers in groups of 32 or more "
        "(int) or in rows (int8), and no layer of this model is; leave the flag out"
    )


def formats_of(model: nn.Module) -> list[WeightFormat]:
    """Return the formats of a model's frozen layers."""
    return [layer.weight_format for layer in _layers(model)]


def computes_with(model: nn.Module) -> Activations:
    """Return what `compute_with` set, of which there is one for a model."""
    return next((one.activations for one in _layers(model)), "float")


def _layers(model: nn.Module) -> Iterator[FrozenLinear]:
    return (module for module in model.modules() if isinstance(module, FrozenLinear))
