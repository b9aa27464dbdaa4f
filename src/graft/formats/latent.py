"""Integers rounded anew from a latent weight: the base of training inside the quantiser."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from graft.errors import GraftError
from graft.formats.base import GridUpdate, Packed, TensorSpec, WeightFormat
from graft.formats.dense import DenseFormat
from graft.formats.int_group import IntGroupFormat
from graft.kernels import latent_ops
from graft.kernels.weights import Weight

_WITHIN = 0.47
"""How far a latent weight may lie from the code that a solver chose, in steps: less than half, so
that rounding it to bf16 does not choose another."""


@dataclass(frozen=True)
class LatentFormat:
    """w = scale * round((W - offset) / scale) + offset: an int weight with W, before the rounding.

    The layer computes with the integers; an update of W (`GridUpdate.weights`) rounds them anew on
    the same grid, so codes flip, and its scales and offsets may move besides. What `absorb` returns
    is a plain int weight: that is what training computes with and what a merge keeps.

    With `rounds` false the layer still computes with W itself, as in the first part of a training;
    then nothing can be absorbed.

    Packed tensors, for g = ceil(in_features / group_size):

    - weight: `dtype` [out_features, in_features];
    - scales, offsets: float16 (or float32) [out_features, g].
    """

    bits: int = 4
    group_size: int = 32
    statistics: str = "float16"
    dtype: str = "bfloat16"
    rounds: bool = True
    name: str = "latent"

    def __post_init__(self) -> None:
        _ = self.deployed, self._dense  # which check the options

    @property
    def deployed(self) -> IntGroupFormat:
        """The int format that the weight is computed with and merged into."""
        return IntGroupFormat(self.bits, self.group_size, self.statistics)

    @property
    def _dense(self) -> DenseFormat:
        return DenseFormat(self.dtype)

    @property
    def _computed(self) -> WeightFormat:
        return self.deployed if self.rounds else self._dense

    def options(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain JSON values."""
        return self.deployed.options() | self._dense.options() | {"rounds": self.rounds}

    def groups(self, in_features: int) -> int:
        """Return the number of groups in a row."""
        return self.deployed.groups(in_features)

    def storage(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Return every packed tensor's shape and dtype."""
        grid = self.deployed.storage(out_features, in_features)
        statistics = {name: grid[name] for name in ("scales", "offsets")}
        return self._dense.storage(out_features, in_features) | statistics

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Keep the weight, and fit the grid to it as the int format does."""
        packed = self._dense.pack(weight)
        rounded = self.deployed.pack(packed["weight"])
        return packed | {name: rounded[name] for name in ("scales", "offsets")}

    def unpack(
        self, packed: Packed, out_features: int, in_features: int, dtype: torch.dtype
    ) -> Tensor:
        """Return the weight that the layer computes with."""
        return self._computed.unpack(self.rounded(packed), out_features, in_features, dtype)

    def linear(self, x: Tensor, packed: Packed, out_features: int) -> Tensor:
        """Return y = x Wᵀ in x's dtype, W as the layer computes with it."""
        return self._computed.linear(x, self.rounded(packed), out_features)

    def kernel_weight(self, packed: Packed, out_features: int, in_features: int) -> Weight:
        """Return the weight that the layer computes with as the kernels see it."""
        return self._computed.kernel_weight(self.rounded(packed), out_features, in_features)

    def rounded(self, packed: Packed) -> Packed:
        """Return the weight as the layer computes with it: in the int format, once it rounds.

        One that has absorbed an update is in that format already.
        """
        if "codes" in packed or not self.rounds:
            return packed
        absorbed = self.absorb(packed, GridUpdate())
        assert absorbed is not None
        return absorbed

    def absorb(self, packed: Packed, update: GridUpdate) -> dict[str, Tensor] | None:
        """Return the int weight of W + d_weights, on the grid with its statistics moved.

        The codes are those of the grid before its move: q = round((W + d_weights - offset) / scale)
        in 0 to 2^bits - 1, in float32. Not differentiable in d_weights: `latent_linear` is.
        Raises GraftError when the weight has been rounded already and W is to move, or when it is
        not to be rounded yet.
        """
        if not self.rounds:
            raise GraftError("the weights of this run are not rounded yet; go on with --resume")
        if "codes" in packed:
            if update.weights is not None:
                raise GraftError(
                    "two adapters that round the weight anew cannot be active at once; merge one"
                )
            return self.deployed.absorb(packed, update)
        move = update.weights
        codes, codes_high = latent_ops.latent_codes(
            packed["weight"],
            packed["scales"],
            packed["offsets"],
            *((None, None, 1.0) if move is None else (move.A, move.B, move.scaling)),
            self.bits,
            self.group_size,
        )
        high = {"codes_high": codes_high} if self.bits == 3 else {}
        grid = {name: packed[name] for name in ("scales", "offsets")}
        # The codes answered to the move of W; what is left is that of the grid.
        grid_alone = replace(update, weights=None)
        return self.deployed.absorb({"codes": codes, **high, **grid}, grid_alone)

    # What a solver needs ---------------------------------------------------------------------

    def fit_grid(self, weight: Tensor, importance: Tensor) -> dict[str, Tensor]:
        """Fit the grid as the int format does."""
        return self.deployed.fit_grid(weight, importance)

    def refit_grid(
        self, grid: Packed, codes: Tensor, weight: Tensor, hessian: Tensor
    ) -> dict[str, Tensor]:
        """Return the statistics that suit the codes best, as the int format does."""
        return self.deployed.refit_grid(grid, codes, weight, hessian)

    def round_column(self, values: Tensor, grid: Packed, column: int) -> tuple[Tensor, Tensor]:
        """Round values of one column as the int format does."""
        return self.deployed.round_column(values, grid, column)

    def pack_codes(self, codes: Tensor, grid: Packed, values: Tensor) -> dict[str, Tensor]:
        """Keep the values that were rounded, each within the range that rounds to its code.

        A solver rounds values that make up for earlier errors; kept as the latent weight, they
        round to the solver's codes again, and say how near each is to another code. Beyond the
        grid's ends there is no bound.
        """
        group = torch.arange(codes.shape[1], device=codes.device) // self.group_size
        scales, offsets = (grid[name].double()[:, group] for name in ("scales", "offsets"))
        steps = (values.to(scales) - offsets) / scales
        low = torch.where(codes == 0, -torch.inf, codes - _WITHIN)
        high = torch.where(codes == self.deployed.levels, torch.inf, codes + _WITHIN)
        weight = steps.clamp(low, high) * scales + offsets
        return self._dense.pack(weight) | {name: grid[name] for name in ("scales", "offsets")}
