"""Group-wise integer weights with a float offset per group: the format that absorbs updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graft.errors import GraftError
from graft.formats.base import (
    GridUpdate,
    LowRank,
    OffsetGridFormat,
    Packed,
    Scaled,
    TensorSpec,
)
from graft.formats.entry import FormatEntry
from graft.formats.grid_fit import fit_affine, refit_affine
from graft.formats.latent_grid import LatentGrid
from graft.kernels.frozen import ops
from graft.kernels.frozen.reference import nearest_codes
from graft.kernels.latent import ops as latent_ops
from graft.kernels.low_rank import ops as low_rank_ops
from graft.kernels.moves import ops as affine_ops
from graft.kernels.moves.reference import round_once
from graft.kernels.packed.planes import PLANES, named_planes, pack_codes, plane_bytes
from graft.kernels.packed.weight import Layout, Weight

GROUP_SIZES = (8, 16, 32, 64, 128)
_STATISTICS = {"float16": torch.float16, "float32": torch.float32}
_WITHIN = 0.44
"""How far a latent weight may lie from the code that a solver chose, in steps: less than half, so
that rounding it to bf16 does not choose another, nor to 8 bits over a range of 30 steps."""
SMALLEST_SCALE = 2.0**-20
"""Keeps a constant group's scale a positive fp16 number, so that no reader divides by zero."""


class _RoundStatistics(torch.autograd.Function):
    """Round to the stored dtype, hand out float32, and pass the gradient straight through.

    The gradient stays float32: fp16 would overflow and underflow.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, stored_dtype: torch.dtype) -> Tensor:
        return round_once(values, stored_dtype).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].double(), None


def _round_statistics(values: Tensor, stored_dtype: torch.dtype) -> Tensor:
    rounded: Tensor = _RoundStatistics.apply(values, stored_dtype)  # type: ignore[no-untyped-call]
    return rounded


@dataclass(frozen=True)
class IntGroupFormat(LatentGrid, OffsetGridFormat):
    """w = scale * q + offset, q an integer of `bits` bits, one scale and offset a group.

    Groups are `group_size` neighbouring inputs of one output row; the last group of a row may be
    short. With this offset form (rather than (q - zero) * scale) an update that is constant in
    each group is one addition to the offsets (QA-LoRA, arXiv 2309.14717, section 3.3).

    Packed tensors, for g = ceil(in_features / group_size):

    - codes: uint8 [out_features, bytes], and for 3 bits also codes_high;
      `graft.kernels.packed.planes` says which code lies where;
    - scales, offsets: float16 (or float32) [out_features, g].
    """

    bits: int = 4
    group_size: int = 32
    statistics: str = "float16"
    name: str = "int"
    latent_workspace = 8  # two float32 gradients

    def __post_init__(self) -> None:
        problems = []
        if self.bits not in PLANES:
            problems.append(f"bits is {self.bits}; expected 2, 3, 4 or 8")
        if self.group_size not in GROUP_SIZES:
            problems.append(f"group_size is {self.group_size}; expected 8, 16, 32, 64 or 128")
        if self.statistics not in _STATISTICS:
            problems.append(f"statistics is {self.statistics!r}; expected float16 or float32")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def _dtype(self) -> torch.dtype:
        return _STATISTICS[self.statistics]

    portable = True

    @property
    def integers(self) -> IntGroupFormat:
        """Itself."""
        return self

    @property
    def meets_rounded(self) -> bool:
        """Whether groups are whole blocks of 32."""
        return self.group_size % 32 == 0

    def words(self) -> str:
        """Return what it is, for a reader's eyes."""
        return f"{self.bits}-bit integers in groups of {self.group_size}"

    def options(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain JSON values."""
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "statistics": self.statistics,
        }

    def groups(self, in_features: int) -> int:
        """Return the number of groups in a row."""
        return -(-in_features // self.group_size)

    def storage(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Return every packed tensor's shape and dtype."""
        specs = {
            name: TensorSpec((out_features, plane_bytes(bits, in_features)), torch.uint8)
            for name, bits in zip(("codes", "codes_high"), PLANES[self.bits], strict=False)
        }
        shape = (out_features, self.groups(in_features))
        statistics = TensorSpec(shape, _STATISTICS[self.statistics])
        return specs | {"scales": statistics, "offsets": statistics}

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Round to nearest on the grid from each group's minimum to its maximum."""
        planes, scales, offsets = ops.int_group_quantize(
            weight, self.bits, self.group_size, self._dtype, SMALLEST_SCALE
        )
        _check_finite(scales, offsets, self.statistics)
        return {**named_planes(planes), "scales": scales, "offsets": offsets}

    def kernel_weight(self, packed: Packed, out_features: int, in_features: int) -> Weight:
        """Return the weight as the kernels see it."""
        layout = Layout("int_group", out_features, in_features, self.bits, self.group_size)
        names = "codes", "codes_high", "scales", "offsets"
        return Weight(layout, tuple(packed.get(name) for name in names))

    def absorb(self, packed: Packed, update: GridUpdate) -> dict[str, Tensor]:
        """Return the packed tensors with scales and offsets moved and rounded as stored.

        new = stored_dtype(old + update), the sum taken in float64; the moved statistics come as
        float32 tensors that hold stored-dtype values. Training forward and merge both call this,
        so both see the very same numbers. Raises GraftError when the weight itself is to move.
        """
        if update.weights is not None:
            raise GraftError(
                "codes cannot round anew without the weight that they came from; quantise the base "
                "to the latent format"
            )
        absorbed = dict(packed)
        for name, move in (("scales", update.scales), ("offsets", update.offsets)):
            if isinstance(move, LowRank):
                absorbed[name] = low_rank_ops.move_offsets(
                    packed[name], move.A, move.B, move.scaling, self._dtype
                )
            elif isinstance(move, Scaled):
                absorbed[name] = affine_ops.moved_through(
                    packed[name], packed["scales"], move.moves, self._dtype
                )
            elif move is not None:
                moved = packed[name].double() + move
                absorbed[name] = _round_statistics(moved, self._dtype)
        return absorbed

    # What a solver needs ---------------------------------------------------------------------

    def fit_grid(self, weight: Tensor, importance: Tensor) -> dict[str, Tensor]:
        """Return scales and offsets [out_features, groups] of small weighted squared error.

        Raises GraftError when they are not finite.
        """
        scales, offsets = fit_affine(
            weight, importance, self.bits, self.group_size, self._dtype, SMALLEST_SCALE
        )
        _check_finite(scales, offsets, self.statistics)
        return {"scales": scales, "offsets": offsets}

    def round_column(
        self, values: Tensor, grid: Packed, column: int, columns: int
    ) -> tuple[Tensor, Tensor]:
        """Round values float32 [out_features] of one column to the nearest representable ones."""
        group = column // self.group_size
        scales, offsets = grid["scales"][:, group].float(), grid["offsets"][:, group].float()
        codes = nearest_codes(values, scales, offsets, self.bits)
        return codes, scales * codes + offsets

    def refit_grid(
        self, grid: Packed, codes: Tensor, weight: Tensor, hessian: Tensor
    ) -> dict[str, Tensor]:
        """Return the scales and offsets of least output error for these codes."""
        statistics = grid["scales"], grid["offsets"]
        scales, offsets = refit_affine(
            weight, codes, *statistics, hessian, self.group_size, SMALLEST_SCALE
        )
        return {"scales": scales, "offsets": offsets}

    def pack_codes(
        self, codes: Tensor, grid: Packed, values: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Pack codes uint8 [out_features, in_features] and the grid.

        Raises GraftError when the grid is not finite.
        """
        _check_finite(grid["scales"], grid["offsets"], self.statistics)
        planes = named_planes(pack_codes(codes, self.bits))
        return planes | {"scales": grid["scales"], "offsets": grid["offsets"]}

    def with_offsets(self, packed: Packed, codes: Tensor, offsets: Tensor) -> dict[str, Tensor]:
        """Return the packed weight on the same scales with other offsets and the codes for them."""
        return self.pack_codes(codes, {"scales": packed["scales"], "offsets": offsets})

    # What training inside the rounding needs -------------------------------------------------

    def pack_grid(self, grid: Packed) -> dict[str, Tensor]:
        """Return scales and offsets as they are stored."""
        return {name: grid[name] for name in ("scales", "offsets")}

    def keep_within(self, values: Tensor, codes: Tensor, grid: Packed) -> Tensor:
        """Return the values, each moved into the range that rounds to its code; float64."""
        group = torch.arange(codes.shape[1], device=codes.device) // self.group_size
        scales, offsets = (grid[name].double()[:, group] for name in ("scales", "offsets"))
        steps = (values.to(scales) - offsets) / scales
        low = torch.where(codes == 0, -torch.inf, codes - _WITHIN)
        high = torch.where(codes == self.levels, torch.inf, codes + _WITHIN)
        return steps.clamp(low, high) * scales + offsets

    def round_to(self, weight: Tensor, grid: Packed) -> dict[str, Tensor]:
        """Return the packed weight nearest to a weight, with the statistics as they are."""
        return self._rounded(weight, grid, None)

    def reaches(self, weight: Tensor, grid: Packed) -> Tensor:
        """Return which elements lie between the first and the last code, or half a step beyond."""
        group = torch.arange(weight.shape[1], device=weight.device) // self.group_size
        scales, offsets = (grid[name].float()[:, group] for name in ("scales", "offsets"))
        codes = ((weight - offsets) / scales).round_()
        return (codes >= 0) & (codes <= self.levels)

    def round_latent(self, kept: Weight, grid: Packed, update: LowRank | None) -> dict[str, Tensor]:
        """Return round((W + update - offset) / scale) in 0 to 2^bits - 1, in float32, packed."""
        return self._rounded(latent_ops.kept_weight(kept), grid, update)

    def _rounded(self, weight: Tensor, grid: Packed, update: LowRank | None) -> dict[str, Tensor]:
        planes = latent_ops.latent_codes(
            weight,
            grid["scales"],
            grid["offsets"],
            *((None, None, 1.0) if update is None else (update.A, update.B, update.scaling)),
            self.bits,
            self.group_size,
        )
        return {**named_planes(planes), **self.pack_grid(grid)}

    def latent_linear(
        self,
        x: Tensor,
        kept: Weight,
        grid: Packed,
        update: LowRank,
        u: Tensor | None,
        v: Tensor | None,
    ) -> Tensor:
        """Return y = x Wᵀ for the rounded weight, in one operation; u and v move its statistics."""
        low_rank = update.A, update.B, update.scaling
        statistics, options = (grid["scales"], grid["offsets"]), (self.bits, self.group_size)
        y: Tensor = latent_ops.latent_linear(x, kept, *statistics, *low_rank, u, v, *options)
        return y


def _check_finite(scales: Tensor, offsets: Tensor, statistics: str) -> None:
    if not (scales.isfinite().all() and offsets.isfinite().all()):
        raise GraftError(
            f"the scales or offsets are not finite in {statistics}: the weight holds NaN, "
            f"infinity or values that {statistics} cannot hold; mend the model, or leave "
            "this layer unquantised"
        )


INT = FormatEntry(IntGroupFormat, {"bits": "bits", "budget": "budget", "group_size": "group_size"})
