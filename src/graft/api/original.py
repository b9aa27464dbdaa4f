"""The unquantised model that a merge goes into, and whether it is one of the run's base at all."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from graft.adapters.attach import frozen_layers
from graft.errors import GraftError, raise_problems
from graft.layers.frozen import FrozenLinear
from graft.layers.narrow import NARROW_CLASSES
from graft.model.load import LoadedModel
from graft.model.targets import freeze_layers

_FARTHEST = 1.0
"""Most that a layer's weights may differ from those that were trained on, in units of themselves
(root mean square). Rounding to two bits moves them by 0.5, and those of another model by 1.4."""


class Original(NamedTuple):
    """A model before it was quantised."""

    loaded: LoadedModel
    name: str
    """In words."""
    given: bool
    """It was named for the merge, and is not what the run's base was read from."""
    kept: Collection[str]
    """Tensors outside the layers that are the run's own, as they came with its adapter."""


def original_layers(model: nn.Module, original: Original) -> dict[str, FrozenLinear]:
    """Return the original's layers by name, in place of those of a run's base.

    Raises GraftError unless what was trained on can be them, rounded.
    """
    names = [name for name, _ in frozen_layers(model)]
    there = {name for name, _ in original.loaded.model.named_modules()}
    where = f"--into original: {original.name} is not what the run's base was made of"
    raise_problems([f"it has no layer {one}" for one in names if one not in there][:20], where)
    freeze_layers(original.loaded.model, names)
    bases = dict(frozen_layers(original.loaded.model))
    problems = []
    for name, layer in frozen_layers(model):
        other = bases[name]
        sizes = [layer.out_features, layer.in_features]
        found = [other.out_features, other.in_features]
        if found != sizes:
            problems.append(f"{name} is {found} there, and {sizes} in the run")
        elif layer.weight_format.quantised:
            weight = other.dense_weight(torch.float32)
            moved = layer.dense_weight(torch.float32) - weight
            distance = (moved.norm() / weight.norm().clamp_min(1e-30)).item()
            if not distance < _FARTHEST:
                problems.append(
                    f"{name} differs from what was trained on by {distance:.2g} of itself, which "
                    "no rounding does"
                )
    raise_problems(problems[:20], where)
    return bases


def take_the_rest(model: PreTrainedModel, original: PreTrainedModel, kept: Collection[str]) -> None:
    """Give a merged model all else from the original: embeddings, head, norms, biases.

    Another tool may have stored them in another dtype, and what a run keeps narrow may be wider
    there. kept: those that are the run's own.
    """
    narrow = {id(module.weight) for module in model.modules() if isinstance(module, NARROW_CLASSES)}
    inside = tuple(f"{name}." for name, _ in frozen_layers(model))
    there = dict(original.named_parameters())
    for name, parameter in model.named_parameters():
        other = there.get(name)
        if name in kept or other is None or name.startswith(inside):
            continue
        if other.shape != parameter.shape:
            raise GraftError(
                f"--into original: {name} is {list(other.shape)} in the original, "
                f"{list(parameter.shape)} in the run"
            )
        dtype = other.dtype if id(parameter) in narrow else parameter.dtype
        parameter.data = other.data.to(parameter.device, dtype)
