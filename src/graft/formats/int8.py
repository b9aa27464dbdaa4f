"""Symmetric 8-bit weights with one scale per output row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graft.formats.base import Packed, TensorSpec, WeightFormat
from graft.formats.entry import FormatEntry
from graft.kernels.packed.weight import Layout, Weight


@dataclass(frozen=True)
class Int8Format(WeightFormat):
    """w = scale[row] * code with scale = absmax of the row / 127 (arXiv 2208.07339, equation 4).

    Packed tensors: codes int8 [out_features, in_features], scales float32 [out_features].
    """

    name: str = "int8"

    @property
    def bits(self) -> int:
        """Bits per code."""
        return 8

    @property
    def meets_rounded(self) -> bool:
        """Whether inputs may be rounded, which they may."""
        return True

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

    def kernel_weight(self, packed: Packed, out_features: int, in_features: int) -> Weight:
        """Return the weight as the kernels see it."""
        layout = Layout("int8", out_features, in_features)
        return Weight(layout, (packed["codes"], packed["scales"]))


INT8 = FormatEntry(Int8Format)
