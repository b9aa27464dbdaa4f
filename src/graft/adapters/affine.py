"""Affine tuning: the scales and offsets of a group-wise grid trained directly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graft.adapters.base import Adapter, per_input, scaled_codes
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

    def __init__(
        self, out_features: int, groups: int, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.zeros(out_features, groups, device=device))
        self.v = nn.Parameter(torch.zeros(out_features, groups, device=device))

    def grid_update(self, packed: Packed) -> GridUpdate:
        """Return scales += scale u and offsets += scale v."""
        return GridUpdate(scales=Scaled(self.u), offsets=Scaled(self.v))

    def fused_output(self, x: Tensor, base: FrozenLinear) -> Tensor | None:
        """Return x W'ᵀ, W' on the moved grid, without keeping the moved statistics."""
        if not isinstance(base.weight_format, IntGroupFormat):
            return None
        y: Tensor = affine_linear(x, *base.weight_format.operands(base.packed), self.u, self.v)
        return y

    def delta(self, base: FrozenLinear) -> Tensor:
        """Return the unrounded move of the weight, scale (u q + v), float64 [out, in]."""
        offsets = base.packed["scales"].double() * self.v
        return scaled_codes(base, self.u) + per_input(offsets, base)
