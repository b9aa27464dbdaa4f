"""The unquantised format: the weight itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graft.formats.base import GridUpdate, Packed, TensorSpec
from graft.formats.entry import FormatEntry
from graft.kernels.frozen import row_ops
from graft.kernels.packed.weight import Layout, Weight

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class DenseFormat:
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

    @property
    def bits(self) -> None:
        """None: it has no codes."""
        return None

    @property
    def deployed(self) -> DenseFormat:
        """Itself."""
        return self

    quantised = False
    portable = True
    workspace_bytes = 0

    def words(self) -> str:
        """Return what it is, for a reader's eyes."""
        return self.name

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
        """Return the weight in `dtype`."""
        return packed["weight"].to(dtype)

    def linear(self, x: Tensor, packed: Packed, out_features: int) -> Tensor:
        """Return y = x Wᵀ in x's dtype."""
        out: Tensor = row_ops.dense_linear(x, packed["weight"].to(x.dtype))
        return out

    def kernel_weight(self, packed: Packed, out_features: int, in_features: int) -> Weight:
        """Return the weight as the kernels see it."""
        return Weight(Layout("dense", out_features, in_features), (packed["weight"],))

    def absorb(self, packed: Packed, update: GridUpdate) -> dict[str, Tensor] | None:
        """Return None: a dense weight has no grid."""
        return None


DENSE = FormatEntry(DenseFormat)
