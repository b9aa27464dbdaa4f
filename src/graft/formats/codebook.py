"""4-bit codebook formats: NF4 and FP4, with optional double quantisation of the constants."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graft.formats.base import Packed, TensorSpec
from graft.formats.entry import FormatEntry
from graft.formats.grid_fit import fit_absmax
from graft.formats.latent_grid import LatentGrid
from graft.kernels.frozen import ops
from graft.kernels.packed.codebooks import CODEBOOK_NAMES, codebook, quantisation_bounds
from graft.kernels.packed.weight import NESTED_BLOCK_SIZE, Layout, Weight, plain_absmax

BLOCK_SIZE = 64
_PIECE_BLOCKS = 1 << 12
_WITHIN = 0.88
"""How far a latent weight may lie from the code that a solver chose, as a share of the way to the
next code's range, so that rounding it to bf16 does not choose another."""


@dataclass(frozen=True)
class CodebookFormat(LatentGrid):
    """w = codebook[code] * absmax of its block of 64 (QLoRA, arXiv 2305.14314, equations 3-6).

    Blocks run over the flattened weight, so they straddle rows when in_features is no multiple of
    64. Packed tensors, for n weights in b = ceil(n/64) blocks:

    - codes: uint8 [ceil(n/2)], two codes a byte, the earlier one in the high nibble;
    - absmax: float32 [b]; with double quantisation uint8 [b], codes of the dynamic 8-bit code, and
    - absmax_scale: float32 [ceil(b/256)], absmax_offset: float32 [1]:
      absmax = dynamic_code[absmax] * absmax_scale[block of 256] + absmax_offset.
    """

    name: str = "nf4"
    double_quant: bool = False

    def __post_init__(self) -> None:
        if self.name not in CODEBOOK_NAMES:
            raise ValueError(
                f"codebook is {self.name!r}; expected one of {', '.join(CODEBOOK_NAMES)}"
            )

    @property
    def bits(self) -> int:
        """Bits per code."""
        return 4

    @property
    def group_size(self) -> int:
        """Weights that share a constant."""
        return BLOCK_SIZE

    def options(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain JSON values."""
        return {"double_quant": self.double_quant}

    def storage(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Return every packed tensor's shape and dtype."""
        count = out_features * in_features
        blocks = -(-count // BLOCK_SIZE)
        specs = {"codes": TensorSpec((-(-count // 2),), torch.uint8)}
        if not self.double_quant:
            return specs | {"absmax": TensorSpec((blocks,), torch.float32)}
        nested = -(-blocks // NESTED_BLOCK_SIZE)
        return specs | {
            "absmax": TensorSpec((blocks,), torch.uint8),
            "absmax_scale": TensorSpec((nested,), torch.float32),
            "absmax_offset": TensorSpec((1,), torch.float32),
        }

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Round each weight to the nearest codebook value times its block's absmax."""
        codes, absmax = ops.codebook_quantize(weight.contiguous(), self.name, BLOCK_SIZE)
        return {"codes": codes, **self._pack_absmax(absmax)}

    def kernel_weight(self, packed: Packed, out_features: int, in_features: int) -> Weight:
        """Return the weight as the kernels see it."""
        layout = Layout("codebook", out_features, in_features, 4, BLOCK_SIZE, self.name)
        return Weight(layout, (packed["codes"], packed["absmax"], *self._nested(packed)))

    # What a solver needs ---------------------------------------------------------------------

    def fit_grid(self, weight: Tensor, importance: Tensor) -> dict[str, Tensor]:
        """Return absmax float32 [blocks], and as it will be stored."""
        _, largest = ops.codebook_quantize(weight.float().contiguous(), self.name, BLOCK_SIZE)
        values = codebook(self.name).to(weight.device).sort().values
        absmax = fit_absmax(weight, importance, largest, values, BLOCK_SIZE)
        packed = self._pack_absmax(absmax)
        stored = plain_absmax(packed["absmax"], *self._nested(packed))
        return {"absmax": absmax, "stored_absmax": stored}

    def round_column(
        self, values: Tensor, grid: Packed, column: int, columns: int
    ) -> tuple[Tensor, Tensor]:
        """Round values float32 [out_features] of one column to the nearest representable ones."""
        flat_index = torch.arange(len(values), device=values.device) * columns + column
        absmax = grid["stored_absmax"][flat_index // BLOCK_SIZE]
        bounds, code_of_rank = quantisation_bounds(self.name)
        normalised = values / absmax.clamp(min=1e-38)
        codes = code_of_rank.to(values.device)[
            torch.bucketize(normalised.float(), bounds.to(values.device))
        ]
        return codes, codebook(self.name).to(values.device)[codes.long()] * absmax

    def refit_grid(
        self, grid: Packed, codes: Tensor, weight: Tensor, hessian: Tensor
    ) -> dict[str, Tensor]:
        """Return the grid as it is: a block may straddle rows, which a Hessian does not couple."""
        return dict(grid)

    def pack_codes(
        self, codes: Tensor, grid: Packed, values: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Pack codes uint8 [out_features, in_features] and the grid's absmax."""
        return {"codes": self._in_pairs(codes), **self.pack_grid(grid)}

    def _in_pairs(self, codes: Tensor) -> Tensor:
        """Return codes two a byte, the earlier one in the high nibble."""
        flat = codes.reshape(-1)
        if flat.numel() % 2:
            filler = (codebook(self.name) == 0).nonzero()[0].to(flat)
            flat = torch.cat([flat, filler])
        return (flat[::2] << 4) | flat[1::2]

    # What training inside the rounding needs -------------------------------------------------

    def pack_grid(self, grid: Packed) -> dict[str, Tensor]:
        """Return the constants as they are stored."""
        return self._pack_absmax(grid["absmax"])

    def keep_within(self, values: Tensor, codes: Tensor, grid: Packed) -> Tensor:
        """Return the values, each moved into the range that rounds to its code; float64."""
        absmax = _per_weight(grid["stored_absmax"], values.shape).double()
        bounds, code_of_rank = (one.to(codes.device) for one in quantisation_bounds(self.name))
        rank = code_of_rank.long().argsort()[codes.long()]
        middle = codebook(self.name).to(codes.device)[codes.long()].double()
        infinite = bounds.new_tensor([torch.inf])
        ends = torch.cat([-infinite, bounds, infinite]).double()
        low, high = (middle + (ends[rank + side] - middle) * _WITHIN for side in (0, 1))
        return (values.double() / absmax).clamp(low, high) * absmax

    def round_to(self, weight: Tensor, grid: Packed) -> dict[str, Tensor]:
        """Return the packed weight nearest to a weight, with the constants as they are."""
        bounds, code_of_rank = (one.to(weight.device) for one in quantisation_bounds(self.name))
        codes = torch.empty(weight.numel(), dtype=torch.uint8, device=weight.device)
        for part, units in self._in_units(weight, grid):
            ranks = torch.bucketize(units, bounds, out_int32=True)
            torch.index_select(code_of_rank, 0, ranks, out=codes[part])
        return {**grid, "codes": self._in_pairs(codes)}

    def reaches(self, weight: Tensor, grid: Packed) -> Tensor:
        """Return which elements lie between the ends of the codebook, or half a step beyond."""
        values = codebook(self.name).sort().values.tolist()
        low = values[0] - (values[1] - values[0]) / 2
        high = values[-1] + (values[-1] - values[-2]) / 2
        within = torch.empty(weight.numel(), dtype=torch.bool, device=weight.device)
        for part, units in self._in_units(weight, grid):
            within[part] = (units >= low) & (units <= high)
        return within.view(weight.shape)

    def _in_units(self, weight: Tensor, grid: Packed) -> Iterator[tuple[slice, Tensor]]:
        """Yield the flattened weight in units of its blocks' constants, float32, piece by piece.

        Pieces keep what is made of them small beside the weight.
        """
        absmax = plain_absmax(grid["absmax"], *self._nested(grid)).clamp(min=1e-38)
        flat = weight.reshape(-1)
        for begin in range(0, flat.numel(), _PIECE_BLOCKS * BLOCK_SIZE):
            part = slice(begin, begin + _PIECE_BLOCKS * BLOCK_SIZE)
            first = begin // BLOCK_SIZE
            units = absmax[first : first + _PIECE_BLOCKS].repeat_interleave(BLOCK_SIZE)
            yield part, flat[part] / units[: flat[part].numel()]

    # Statistics ------------------------------------------------------------------------------

    def _pack_absmax(self, absmax: Tensor) -> dict[str, Tensor]:
        if not self.double_quant:
            return {"absmax": absmax}
        offset = absmax.mean()
        codes, scale = ops.codebook_quantize_absmax(absmax, offset)
        return {"absmax": codes, "absmax_scale": scale, "absmax_offset": offset.view(1)}

    def _nested(self, packed: Packed) -> tuple[Tensor | None, Tensor | None]:
        return packed.get("absmax_scale"), packed.get("absmax_offset")


def _per_weight(absmax: Tensor, shape: torch.Size) -> Tensor:
    """Return each weight's own constant, never zero, for a weight of that shape."""
    return absmax.clamp(min=1e-38).repeat_interleave(BLOCK_SIZE)[: shape.numel()].view(shape)


_SETTINGS = {"double_quant": "double_quant"}
NF4 = FormatEntry(partial(CodebookFormat, "nf4"), _SETTINGS)
FP4 = FormatEntry(partial(CodebookFormat, "fp4"), _SETTINGS)
