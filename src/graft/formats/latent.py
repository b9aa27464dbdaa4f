"""A grid's weights rounded anew from a latent weight: the base of training inside the quantiser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from graft.errors import GraftError
from graft.formats.base import (
    GridFormat,
    GridUpdate,
    LowRank,
    Packed,
    TensorSpec,
    WeightFormat,
)
from graft.formats.dense import DenseFormat
from graft.formats.entry import FormatEntry
from graft.formats.int_group import IntGroupFormat
from graft.formats.latent_grid import LatentGrid
from graft.formats.registry import describe_format, parse_format, settings_of
from graft.kernels.latent.ops import whole_blocks
from graft.kernels.packed.weight import Weight

_INT8_NAMES = {"codes": "weight", "scales": "weight_scales", "offsets": "weight_offsets"}


@dataclass(frozen=True)
class LatentFormat(GridFormat):
    """w = round(W) to a grid: a quantised weight with W, before the rounding, beside it.

    The layer computes with the rounded weight; an update of W (`GridUpdate.weights`) rounds it anew
    on the same statistics, so codes flip, and a grid of scales and offsets may move besides. What
    `absorb` returns is a plain weight in the grid's own format: that is what training computes with
    and what a merge keeps.

    With `rounds` false the layer still computes with W itself, as in the first part of a training;
    then nothing can be absorbed.

    Packed tensors:

    - weight: `dtype` [out_features, in_features];
    - the grid's statistics, under its own names (for int: scales and offsets);
    - with dtype int8: weight uint8 and weight_scales and weight_offsets float16 [out_features,
      groups], W = weight_scales * weight + weight_offsets; 9 bits per weight in groups of 32, where
      bfloat16 takes 16.
    """

    grid: LatentGrid = field(default_factory=IntGroupFormat)
    dtype: str = "bfloat16"
    rounds: bool = True
    name: str = "latent"

    def __post_init__(self) -> None:
        if not isinstance(self.grid, LatentGrid):
            raise ValueError(
                "grid is no grid that a weight can be rounded to: give int, nf4 or fp4"
            )
        _ = self._kept  # which checks the dtype
        if self.dtype == "int8" and self.grid.bits == 8:
            raise ValueError("dtype is int8, which has no more digits than 8-bit codes")

    @property
    def deployed(self) -> LatentGrid:
        """The format that the weight is computed with and merged into."""
        return self.grid

    @property
    def bits(self) -> int:
        """Bits per code of the grid."""
        return self.grid.bits

    @property
    def group_size(self) -> int:
        """Weights that share a statistic."""
        return self.grid.group_size

    @property
    def meets_rounded(self) -> bool:
        """Whether the grid's weights meet rounded inputs, once the weight is rounded."""
        return self.rounds and self.grid.meets_rounded

    @property
    def workspace_bytes(self) -> int:
        """What the grid says, and the weight in float32 where it is kept in 8 bits."""
        return self.grid.latent_workspace + (4 if self.dtype == "int8" else 0)

    def words(self) -> str:
        """Return what it is deployed as, for a reader's eyes."""
        return self.grid.words()

    @property
    def _kept(self) -> WeightFormat:
        """The format that W itself is kept in."""
        if self.dtype != "int8":
            return DenseFormat(self.dtype)
        if isinstance(self.grid, IntGroupFormat):
            return replace(self.grid, bits=8)
        return IntGroupFormat(8, self.grid.group_size)

    @property
    def _computed(self) -> WeightFormat:
        return self.grid if self.rounds else self._kept

    def options(self) -> dict[str, Any]:
        """Return what the registry makes it from, as plain JSON values."""
        grid = {"grid": describe_format(self.grid)}
        if isinstance(self.grid, IntGroupFormat):  # version 0.1.0 knew no other grid
            grid = self.grid.options()
        return grid | {"dtype": self.dtype, "rounds": self.rounds}

    def storage(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Return every packed tensor's shape and dtype."""
        shape = out_features, in_features
        statistics = _without_codes(self.grid.storage(*shape))
        kept = self._kept.storage(*shape)
        if self.dtype != "int8":
            return kept | statistics
        kept["codes"] = TensorSpec(shape, torch.uint8)
        return {_INT8_NAMES[name]: spec for name, spec in kept.items()} | statistics

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Keep the weight, and fit the grid to it as the grid's own format does."""
        kept = self.keep(weight)
        source = weight if self.dtype == "int8" else kept["weight"]
        return kept | _without_codes(self.grid.pack(source))

    def keep(self, weight: Tensor) -> dict[str, Tensor]:
        """Return W alone as it is kept, without a grid."""
        packed = self._kept.pack(weight)
        if self.dtype == "int8":
            packed["codes"] = packed["codes"][:, : weight.shape[1]].contiguous()
            return {_INT8_NAMES[name]: tensor for name, tensor in packed.items()}
        return dict(packed)

    def unpack(
        self, packed: Packed, out_features: int, in_features: int, dtype: torch.dtype
    ) -> Tensor:
        """Return the weight that the layer computes with."""
        return self._computed.unpack(self.rounded(packed), out_features, in_features, dtype)

    def kernel_weight(self, packed: Packed, out_features: int, in_features: int) -> Weight:
        """Return the weight that the layer computes with as the kernels see it."""
        return self._computed.kernel_weight(self.rounded(packed), out_features, in_features)

    def rounded(self, packed: Packed) -> Packed:
        """Return the weight as the layer computes with it: in the grid's format, once it rounds.

        One that has absorbed an update is in that format already.
        """
        if "weight" not in packed:
            return packed
        if not self.rounds:
            return self._kept_alone(packed)
        absorbed = self.absorb(packed, GridUpdate())
        assert absorbed is not None
        return absorbed

    def absorb(self, packed: Packed, update: GridUpdate) -> dict[str, Tensor] | None:
        """Return W + d_weights on the grid, with the grid's statistics moved.

        The codes are those of the grid before its move. Not differentiable in d_weights:
        `latent_linear` is. Raises GraftError when the weight has been rounded already and W is to
        move, or when it is not to be rounded yet.
        """
        if not self.rounds:
            raise GraftError("the weights of this run are not rounded yet; go on with --resume")
        if "weight" not in packed:
            if update.weights is not None:
                raise GraftError(
                    "two adapters that round the weight anew cannot be active at once; merge one"
                )
            return self.grid.absorb(packed, update)
        rounded = self.grid.round_latent(
            self.kept_weight(packed), self._statistics(packed), update.weights
        )
        # The codes answered to the move of W; what is left is that of the grid.
        grid_alone = replace(update, weights=None)
        stays = update.scales is None and update.offsets is None
        return rounded if stays else self.grid.absorb(rounded, grid_alone)

    def latent_linear(
        self, x: Tensor, packed: Packed, update: LowRank, u: Tensor | None, v: Tensor | None
    ) -> Tensor:
        """Return y = x Wᵀ for what `absorb` returns, differentiable in x, A, B, u and v."""
        return self.grid.latent_linear(
            x, self.kept_weight(packed), self._statistics(packed), update, u, v
        )

    def kept_weight(self, packed: Packed) -> Weight:
        """Return W as it is kept, as the operations take it."""
        return self._kept.kernel_weight(self._kept_alone(packed), *packed["weight"].shape)

    def _statistics(self, packed: Packed) -> Packed:
        return {name: one for name, one in packed.items() if not name.startswith("weight")}

    def _kept_alone(self, packed: Packed) -> Packed:
        """Return W in the format that it is kept in."""
        if self.dtype != "int8":
            return {"weight": packed["weight"]}
        own = {name: packed[kept] for name, kept in _INT8_NAMES.items()}
        return own | {"codes": whole_blocks(own["codes"])}

    # What a solver needs ---------------------------------------------------------------------

    def fit_grid(self, weight: Tensor, importance: Tensor) -> dict[str, Tensor]:
        """Fit the grid as its own format does."""
        return self.grid.fit_grid(weight, importance)

    def refit_grid(
        self, grid: Packed, codes: Tensor, weight: Tensor, hessian: Tensor
    ) -> dict[str, Tensor]:
        """Return the statistics that suit the codes best, as the grid's own format does."""
        return self.grid.refit_grid(grid, codes, weight, hessian)

    def round_column(
        self, values: Tensor, grid: Packed, column: int, columns: int
    ) -> tuple[Tensor, Tensor]:
        """Round values of one column as the grid's own format does."""
        return self.grid.round_column(values, grid, column, columns)

    def pack_codes(self, codes: Tensor, grid: Packed, values: Tensor) -> dict[str, Tensor]:
        """Keep the values that were rounded, each within the range that rounds to its code.

        A solver rounds values that make up for earlier errors; kept as the latent weight, they
        round to the solver's codes again, and say how near each is to another code.
        """
        weight = self.grid.keep_within(values, codes, grid)
        return self.keep(weight.contiguous()) | self.grid.pack_grid(grid)


def _without_codes(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("codes")}


def _make(
    grid: Mapping[str, Any] | None = None, dtype: str = "bfloat16", rounds: bool = True, **bits: Any
) -> LatentFormat:
    """Return the format from its options: those of int, or the description of another grid."""
    if grid is None:
        return LatentFormat(IntGroupFormat(**bits), dtype, rounds)
    if bits or not isinstance(grid, Mapping) or "format" not in grid:
        raise ValueError(f"grid is {grid!r} beside {bits}; expected a format with all its options")
    chosen: Any = parse_format(grid)
    return LatentFormat(chosen, dtype, rounds)


def _as_settings(latent: LatentFormat, _: Mapping[str, str]) -> dict[str, Any]:
    return settings_of(latent.grid) | {"latent_dtype": latent.dtype}


LATENT = FormatEntry(
    _make, {"bits": "bits", "group_size": "group_size", "latent_dtype": "dtype"}, _as_settings
)
