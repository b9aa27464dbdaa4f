"""Symmetric 8-bit weights with one scale per output row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graft.formats.base import GridUpdate, Packed, TensorSpec
from graft.formats.entry import FormatEntry
from graft.kernels.frozen import row_ops
from graft.kernels.packed.weight import Layout, Weight


@dataclass(frozen=True)
class Int8Format:
    """w = scale[row] * code with scale = absmax of the row / 127 (arXiv 2208.07339, equation 4).

    Packed tensors: codes int8 [out_features, in_features], scales float32 [out_features].
    """

    name: str = "int8"

    @property
    def bits(self) -> int:
        """Bits per code."""
        return 8

    @property
    def deployed(self) -> Int8Format:
        """Itself."""
        return self

    quantised = True
    portable = False
    workspace_bytes = 0

    def words(self) -> str:
        """Return what it is, for a reader's eyes."""
        return self.name

    def options(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain JSON values."""
        return {}

    def storage(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Return every packed tensor's shape and dtype."""
        return {
            "codes": TensorSpec((out_features, in_features), torch.int8),
            "scales": TensorSpec((out_features,), torch.float32),
        }

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Round each weight to the nearest of 255 equally spaced values of its row."""
        values = weight.float()
        scales = values.abs().amax(-1) / 127
        divisor = torch.where(scales > 0, scales, 1.0).unsqueeze(-1)
        codes = (values / divisor).round_().clamp_(-127, 127).to(torch.int8)
        return {"codes": codes, "scales": scales}

    def unpack(
        self, packed: Packed, out_features: int, in_features: int, dtype: torch.dtype
    ) -> Tensor:
        """Return scale * code, computed in float32 and rounded once to `dtype`."""
        return (packed["codes"].float() * packed["scales"].unsqueeze(-1)).to(dtype)

    def linear(self, x: Tensor, packed: Packed, out_features: int) -> Tensor:
        """Return y = x Wᵀ in x's dtype, differentiable in x."""
        out: Tensor = row_ops.int8_linear(x, packed["codes"], packed["scales"])
        return out

    def kernel_weight(self, packed: Packed, out_features: int, in_features: int) -> Weight:
        """Return the weight as the kernels see it."""
        layout = Layout("int8", out_features, in_features)
        return Weight(layout, (packed["codes"], packed["scales"]))

    def absorb(self, packed: Packed, update: GridUpdate) -> dict[str, Tensor] | None:
        """Return None: one scale per row cannot take up a low-rank update."""
        return None


INT8 = FormatEntry(Int8Format)
