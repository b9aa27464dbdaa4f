"""The unquantised format: the weight itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graft.formats.base import Packed, TensorSpec, WeightFormat
from graft.formats.entry import FormatEntry
from graft.kernels.packed.weight import Layout, Weight

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class DenseFormat(WeightFormat):
    """A weight kept as one tensor `weight` [out_features, in_features] of a floating dtype."""

    dtype: str = "float32"
    name: str = "dense"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; expected one of {', '.join(_DTYPES)}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The stored dtype."""
        return _DTYPES[self.dtype]

    quantised = False
    portable = True

    def options(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain JSON values."""
        return {"dtype": self.dtype}

    def storage(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Return the one tensor's shape and dtype."""
        return {"weight": TensorSpec((out_features, in_features), self.torch_dtype)}

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Round the weight to the stored dtype."""
        return {"weight": weight.to(self.torch_dtype)}

    def unpack(
        self, packed: Packed, out_features: int, in_features: int, dtype: torch.dtype
    ) -> Tensor:
        """Return the weight in `dtype`, without a copy where it has that dtype."""
        return packed["weight"].to(dtype)

    def kernel_weight(self, packed: Packed, out_features: int, in_features: int) -> Weight:
        """Return the weight as the kernels see it."""
        return Weight(Layout("dense", out_features, in_features), (packed["weight"],))


DENSE = FormatEntry(DenseFormat)
