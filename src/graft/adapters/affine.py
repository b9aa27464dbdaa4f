"""Affine tuning: the scales and offsets of a group-wise grid trained directly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from graft.adapters.base import (
    Adapter,
    StoredAdapter,
    fill,
    per_input,
    require_format,
    scaled_codes,
)
from graft.adapters.config import AdapterConfig
from graft.adapters.method import Method, narrow_solver
from graft.adapters.rates import grid_rate
from graft.formats.base import GridUpdate, Packed, Scaled
from graft.formats.int_group import IntGroupFormat
from graft.kernels.moves.ops import affine_linear
from graft.layers.frozen import FrozenLinear


class AffineAdapter(Adapter):
    """scale' = scale (1 + u), offset' = offset + scale v: moves in units of the group's own scale.

    u, v: float32 [out_features, groups], zero. Training scales alone is PEQA (arXiv 2305.14152);
    in relative units one learning rate serves every layer and bit width. As with QA-LoRA, the
    forward rounds the moved statistics as they are stored, so the merge is exact.
    """

    method = "affine"
    moves_grid = True
    needed_format = "int"
    own_names = ("u", "v")

    def __init__(
        self, out_features: int, groups: int, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.zeros(out_features, groups, device=device))
        self.v = nn.Parameter(torch.zeros(out_features, groups, device=device))

    @classmethod
    def from_layer(cls, layer: FrozenLinear, config: AdapterConfig) -> Self:
        """Return a fresh adapter, which changes nothing yet."""
        weight_format = require_format(layer, IntGroupFormat, cls)
        groups = weight_format.groups(layer.in_features)
        return cls(layer.out_features, groups, next(layer.parameters()).device)

    @classmethod
    def from_stored(cls, layer: FrozenLinear, stored: StoredAdapter) -> Self:
        """Return the adapter of a file."""
        weight_format = require_format(layer, IntGroupFormat, cls)
        adapter = cls(layer.out_features, weight_format.groups(layer.in_features))
        fill(adapter, stored.tensors)
        return adapter

    def grid_update(self, packed: Packed) -> GridUpdate:
        """Return scales += scale u and offsets += scale v."""
        return GridUpdate(scales=Scaled(self.u), offsets=Scaled(self.v))

    def fused_output(self, x: Tensor, base: FrozenLinear) -> Tensor | None:
        """Return x W'ᵀ, W' on the moved grid, without keeping the moved statistics."""
        if base.weight_format.integers is None:
            return None
        y: Tensor = affine_linear(x, base.kernel_weight(), self.u, self.v)
        return y

    def delta(self, base: FrozenLinear) -> Tensor:
        """Return the unrounded move of the weight, scale (u q + v), float64 [out, in]."""
        group_size = require_format(base, IntGroupFormat, type(self)).group_size
        offsets = per_input(base.packed["scales"].double() * self.v, group_size, base.in_features)
        return scaled_codes(base, self.u, group_size) + offsets


class Affine(Method):
    """The scales and offsets of group-wise integers, trained directly."""

    name = "affine"
    adapter = AffineAdapter
    default_format = "int"
    formats = ("int",)
    merges_exactly = True

    def card_rows(self, config: AdapterConfig) -> dict[str, object]:
        """Return nothing: it has no rank."""
        return {}

    def default_solver(self, bits: int | str | None) -> str:
        """Return a calibrated solver where what narrow codes lose stays lost."""
        return narrow_solver(bits)

    def learning_rate(self, config: AdapterConfig, hidden_size: int) -> float:
        """Return the default peak learning rate of AdamW: that of a grid."""
        return grid_rate(hidden_size)

    def rate_factors(
        self, config: AdapterConfig, hidden_size: int, bits: Mapping[str, int]
    ) -> dict[str, float]:
        """Return (2^bits - 1) / 3 for v, which is 1 at 2 bits.

        v moves an offset by so many steps of the grid, u the scale by a share of itself. For one
        step of Adam to move the weights as far by either, v's rate grows with the number of steps
        in a group's range.
        """
        return {name: (2**width - 1) / 3 for name, width in bits.items() if name.endswith(".v")}


AFFINE = Affine()
