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
from graft.kernels.latent import ops as latent_ops
from graft.kernels.packed.weight import Weight

_WITHIN = 0.44
"""How far a latent weight may lie from the code that a solver chose, in steps: less than half, so
that rounding it to bf16 does not choose another, nor to 8 bits over a range of 30 steps."""
_INT8_NAMES = {"codes": "weight", "scales": "weight_scales", "offsets": "weight_offsets"}


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
    - scales, offsets: float16 (or float32) [out_features, g];
    - with dtype int8: weight uint8 and, as scales and offsets are, weight_scales and
      weight_offsets, W = weight_scales * weight + weight_offsets; 9 bits per weight in groups of
      32, where bfloat16 takes 16.
    """

    bits: int = 4
    group_size: int = 32
    statistics: str = "float16"
    dtype: str = "bfloat16"
    rounds: bool = True
    name: str = "latent"

    def __post_init__(self) -> None:
        _ = self.deployed, self._kept  # which check the options
        if self.dtype == "int8" and self.bits == 8:
            raise ValueError("dtype is int8, which has no more digits than 8-bit codes")

    @property
    def deployed(self) -> IntGroupFormat:
        """The int format that the weight is computed with and merged into."""
        return IntGroupFormat(self.bits, self.group_size, self.statistics)

    @property
    def _kept(self) -> WeightFormat:
        """The format that W itself is kept in."""
        if self.dtype == "int8":
            return IntGroupFormat(8, self.group_size, self.statistics)
        return DenseFormat(self.dtype)

    @property
    def _computed(self) -> WeightFormat:
        return self.deployed if self.rounds else self._kept

    def options(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain JSON values."""
        return self.deployed.options() | {"dtype": self.dtype, "rounds": self.rounds}

    def groups(self, in_features: int) -> int:
        """Return the number of groups in a row."""
        return self.deployed.groups(in_features)

    def storage(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Return every packed tensor's shape and dtype."""
        grid = self.deployed.storage(out_features, in_features)
        statistics = {name: grid[name] for name in ("scales", "offsets")}
        if self.dtype != "int8":
            return self._kept.storage(out_features, in_features) | statistics
        weight = TensorSpec((out_features, in_features), torch.uint8)
        own = {_INT8_NAMES[name]: spec for name, spec in statistics.items()}
        return {"weight": weight} | own | statistics

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Keep the weight, and fit the grid to it as the int format does."""
        kept = self.keep(weight)
        source = weight if self.dtype == "int8" else kept["weight"]
        rounded = self.deployed.pack(source)
        return kept | {name: rounded[name] for name in ("scales", "offsets")}

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
        if "codes" in packed:
            return packed
        if not self.rounds:
            return self._kept_alone(packed)
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
            latent_ops.kept_weight(*self.kept_operands(packed), self.group_size),
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

    def kept_operands(self, packed: Packed) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return W as the operations take it: the tensor, and its scales and offsets or None."""
        return packed["weight"], packed.get("weight_scales"), packed.get("weight_offsets")

    def _kept_alone(self, packed: Packed) -> Packed:
        """Return W in the format that it is kept in."""
        weight, scales, offsets = self.kept_operands(packed)
        if scales is None or offsets is None:
            return {"weight": weight}
        return {"codes": latent_ops.whole_blocks(weight), "scales": scales, "offsets": offsets}

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
        return self.keep(weight) | {name: grid[name] for name in ("scales", "offsets")}
