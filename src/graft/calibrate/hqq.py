"""HQQ: offsets that make the error sparse rather than small in the square, without any data."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.calibrate.base import Solver
from graft.errors import GraftError
from graft.formats.base import OffsetGridFormat, Packed, WeightFormat
from graft.formats.grid_fit import grouped, nearest, pieces
from graft.kernels.moves.reference import round_once

NORM = 0.7
ROUNDS = 20
BETA, BETA_GROWTH = 10.0, 1.01


class Hqq(Solver):
    """Round to nearest on offsets that are fitted to each weight by itself; see `hqq_pack`."""

    name = "hqq"

    def problem(self, weight_format: WeightFormat | None) -> str | None:
        """Return why it cannot round to a format: one without offsets of its own to fit."""
        if weight_format is None or isinstance(weight_format, OffsetGridFormat):
            return super().problem(weight_format)
        name = weight_format.name
        return f"it fits the offsets of the int format; {name} has none. Give --format int"

    def pack(self, weight: Tensor, weight_format: WeightFormat) -> Packed:
        """Round a weight by itself."""
        return hqq_pack(weight, weight_format)


def hqq_pack(weight: Tensor, weight_format: WeightFormat) -> dict[str, Tensor]:
    """Return the packed weight whose offsets make the error's l_p norm small, p = 0.7.

    Half-quadratic quantisation (Badri and Shaji, "Half-Quadratic Quantization of Large Machine
    Learning Models", 2023, equations 4 to 6) in the form w = scale q + offset: the scales are those
    between minimum and maximum, and in turns

        q = nearest codes;  e = shrink(w - scale q - offset, beta);  offset = mean(w - scale q - e),

    with the generalised soft threshold shrink(r) = sign(r) max(|r| - |r|^(p-1) / beta, 0), so that
    a few large errors are set aside and do not pull the offset. beta grows by 1 % a round. Errors
    are taken in units of the group's scale, which makes the result independent of the weight's
    own magnitude; of all rounds each group keeps the offset of least l_p error, round to nearest
    being the first.

    weight [out_features, in_features]; float64, rounded to the stored dtype in every round.
    Raises GraftError for a format without such offsets.
    """
    if not isinstance(weight_format, OffsetGridFormat):
        raise GraftError(
            f"solver 'hqq' fits the offsets of the int format, found {weight_format.name!r}; give "
            "--format int, or --solver rtn"
        )
    bits, group_size = weight_format.bits, weight_format.group_size
    packed = weight_format.pack(weight)
    offsets = packed["offsets"].clone()
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for rows in pieces(*weight.shape):
        scale = packed["scales"][rows].double()
        columns = torch.ones(weight.shape[1], dtype=torch.float64, device=weight.device)
        w, inside = grouped(weight[rows].double(), columns, group_size)
        offset = _fit_offsets(w, inside, scale, offsets[rows], bits)
        q = nearest(w, scale, offset.double(), bits).flatten(1)
        offsets[rows], codes[rows] = offset, q[:, : weight.shape[1]].to(torch.uint8)
    return weight_format.with_offsets(packed, codes, offsets)


def _lp_error(w: Tensor, inside: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    """Return sum |w - scale q - offset|^p of each group in units of its scale."""
    q = nearest(w, scale, offset, bits)
    return (inside * _in_steps(w, q, scale, offset).abs().pow(NORM)).sum(-1)


def _fit_offsets(w: Tensor, inside: Tensor, scale: Tensor, start: Tensor, bits: int) -> Tensor:
    """Return the best offsets [rows, groups] in their stored dtype; w [rows, groups, group_size].

    inside: 1 for a weight and 0 for the filler of a short last group.
    """
    best, offset, beta = start.double(), start.double(), BETA
    least = _lp_error(w, inside, scale, best, bits)
    for _ in range(ROUNDS):
        q = nearest(w, scale, offset, bits)
        lost = _in_steps(w, q, scale, offset)
        size = lost.abs()
        kept = (size - size.clamp(min=1e-12).pow(NORM - 1) / beta).clamp(min=0)
        move = (inside * (lost - lost.sign() * kept)).sum(-1) / inside.sum(-1)
        offset = round_once(offset + scale * move, start.dtype).double()
        error = _lp_error(w, inside, scale, offset, bits)
        best = torch.where(error < least, offset, best)
        least = torch.minimum(error, least)
        beta *= BETA_GROWTH
    return best.to(start.dtype)


def _in_steps(w: Tensor, q: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return (w - scale[..., None] * q - offset[..., None]) / scale[..., None]


HQQ = Hqq()
