"""The kinds of layers whose weights are quantised and adapted; a new one is a file and a line."""

from __future__ import annotations

from torch import nn

from graft.entries import Entries, Listed
from graft.layers.base import LayerKind

LAYER_KINDS: Entries[LayerKind] = Entries(
    "layer kind",
    {
        "linear": Listed("graft.layers.linear:LINEAR", "torch's linear layer"),
        "narrow": Listed("graft.layers.narrow:NARROW_LINEAR", "a linear layer in bfloat16"),
        "conv1d": Listed("graft.layers.conv1d:CONV1D", "GPT-2's, stored the other way round"),
        "frozen": Listed("graft.layers.linear:FROZEN", "what takes a layer's place"),
    },
)


def find_kind(module: nn.Module) -> LayerKind | None:
    """Return the kind of a module's nearest class that is listed; None when none is.

    Nor is a module of any kind whose class inherits from one and computes something else.
    """
    kinds = {name: kind for kind in LAYER_KINDS.values() for name in kind.classes}
    for base in type(module).__mro__:
        kind = kinds.get(f"{base.__module__}.{base.__qualname__}")
        if kind is not None or "forward" in vars(base):
            return kind
    return None


def kind_of(module: nn.Module) -> LayerKind:
    """Return the kind of a module that is known to hold a weight; raises TypeError for another."""
    kind = find_kind(module)
    if kind is None:
        raise TypeError(f"{type(module).__name__} is no layer of a kind that graft knows")
    return kind
