"""What a weight format is: a stateless strategy on plain tensors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from graft.kernels.frozen.ops import dequantize
from graft.kernels.packed.weight import Weight

if TYPE_CHECKING:
    from graft.formats.int_group import IntGroupFormat

Packed = Mapping[str, Tensor]
"""The tensors that hold one frozen weight: codes, scales, offsets, absmax ..."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a packed tensor, without its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def empty(self, device: torch.device | str) -> Tensor:
        """Allocate the tensor, uninitialised."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class LowRank:
    """The matrix scaling B A; A [rank, groups or in_features], B [out_features, rank]."""

    A: Tensor
    B: Tensor
    scaling: float


@dataclass(frozen=True)
class Scaled:
    """Moves float32 [out_features, groups] in units of each group's own scale."""

    moves: Tensor


@dataclass(frozen=True)
class GridUpdate:
    """A move of a group-wise grid: scales + d_scales and offsets + d_offsets.

    Each is float64 [out_features, groups], a low-rank or a scaled move, or None when that statistic
    does not move. A latent weight [out_features, in_features] may move too, and rounds anew.
    """

    scales: Tensor | LowRank | Scaled | None = None
    offsets: Tensor | LowRank | Scaled | None = None
    weights: LowRank | None = None


class WeightFormat(ABC):
    """How a frozen weight [out_features, in_features] is stored, and read by the kernels.

    A format is a frozen dataclass whose fields are its options and the registry's name of it.
    """

    name: str
    quantised: ClassVar[bool] = True
    """Whether it holds less than the weight itself."""
    portable: ClassVar[bool] = False
    """Whether the files of other programs can hold it: the weight itself, and integers."""

    @property
    def bits(self) -> int | None:
        """Bits per code; None for weights that have none."""
        return None

    @property
    def meets_rounded(self) -> bool:
        """Whether its weights are integers that meet inputs rounded to 8 bits where these are asked
        for."""
        return False

    @property
    def workspace_bytes(self) -> int:
        """Bytes per weight that training needs for the layer at work, beside its gradients."""
        return 0

    @property
    def integers(self) -> IntGroupFormat | None:
        """Itself as group-wise integers with offsets, which other programs hold too; None for any
        other format."""
        return None

    def words(self) -> str:
        """Return what it is deployed as, for a reader's eyes."""
        return self.name

    @property
    def deployed(self) -> WeightFormat:
        """The format of what `absorb` returns and a merge keeps: itself, but for the latent one."""
        return self

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain JSON values."""

    @abstractmethod
    def storage(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Return every packed tensor's shape and dtype; their sum is the weight's exact size."""

    @abstractmethod
    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Round a weight [out_features, in_features] to the format."""

    @abstractmethod
    def kernel_weight(self, packed: Packed, out_features: int, in_features: int) -> Weight:
        """Return the weight as the operations take it: `linear(x, weight)` and its like."""

    def unpack(
        self, packed: Packed, out_features: int, in_features: int, dtype: torch.dtype
    ) -> Tensor:
        """Return the weight [out_features, in_features], computed in float32 and rounded once."""
        out: Tensor = dequantize(self.kernel_weight(packed, out_features, in_features), dtype)
        return out

    def absorb(self, packed: Packed, update: GridUpdate) -> dict[str, Tensor] | None:
        """Return packed tensors that hold the updated weight exactly; None when it has no grid.

        The result is differentiable in the update (straight through the rounding to storage), so
        the very same call serves the training forward and the merge.
        """
        return None


class GridFormat(WeightFormat):
    """What a solver needs: a grid of representable values per group, rounded to by column.

    Groups are those of the packed layout, whatever the order in which columns are rounded.
    """

    @abstractmethod
    def fit_grid(self, weight: Tensor, importance: Tensor) -> dict[str, Tensor]:
        """Fit the grid's statistics to a weight float32 [out_features, in_features].

        importance: positive float64 [in_features], the weight of each input's squared error.
        """

    @abstractmethod
    def round_column(
        self, values: Tensor, grid: Packed, column: int, columns: int
    ) -> tuple[Tensor, Tensor]:
        """Round one of `columns` columns; returns (codes uint8, rounded values float32).

        values: float32 [out_features].
        """

    @abstractmethod
    def refit_grid(
        self, grid: Packed, codes: Tensor, weight: Tensor, hessian: Tensor
    ) -> dict[str, Tensor]:
        """Return the statistics that suit codes uint8 [out_features, in_features] best.

        What is made small is trace((W - Q) H (W - Q)ᵀ), for a positive definite hessian float64
        [in_features, in_features]; a format that cannot do better returns the grid as it is.
        """

    @abstractmethod
    def pack_codes(self, codes: Tensor, grid: Packed, values: Tensor) -> dict[str, Tensor]:
        """Pack codes uint8 [out_features, in_features] and the grid.

        values: float [out_features, in_features], what was rounded to the codes.
        """


class OffsetGridFormat(GridFormat):
    """A grid w = scale * q + offset of `bits` wide q, whose offsets may be fitted by themselves.

    `pack` returns `scales` and `offsets` [out_features, groups], for groups of `group_size`
    neighbouring inputs.
    """

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits of a code."""

    @property
    @abstractmethod
    def group_size(self) -> int:
        """Inputs that share a scale and an offset."""

    @abstractmethod
    def with_offsets(self, packed: Packed, codes: Tensor, offsets: Tensor) -> dict[str, Tensor]:
        """Return the packed weight on the same scales with other offsets and the codes for them.

        codes: uint8 [out_features, in_features]; offsets [out_features, groups] as they are stored.
        """


def storage_bytes(weight_format: WeightFormat, out_features: int, in_features: int) -> int:
    """Return the exact bytes of a weight in a format."""
    return sum(spec.bytes for spec in weight_format.storage(out_features, in_features).values())
