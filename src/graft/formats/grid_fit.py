"""Fitting the statistics of a group-wise grid: to a weight, and to codes that are chosen already.

Everything is float64 and goes through the rows in pieces, so that the temporaries stay small
beside the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graft.kernels.frozen.reference import fit_groups
from graft.kernels.moves.reference import round_once

ROUNDS = 10
"""Rounds of the alternating fit; the error of nearly every group has settled by then."""
_PIECE_NUMBERS = 1 << 21
_RIDGE = 1e-6
"""Of the mean diagonal: keeps the normal equations solvable where all codes of a group agree."""


def fit_affine(
    weight: Tensor,
    importance: Tensor,
    bits: int,
    group_size: int,
    statistics: torch.dtype,
    smallest_scale: float,
) -> tuple[Tensor, Tensor]:
    """Return scales and offsets [rows, groups] of small weighted squared error, as stored.

    Minimises sum_i h_i (w_i - scale q_i - offset)² group by group: from the grid between minimum
    and maximum on, the nearest codes q and the least-squares scale and offset for those codes take
    turns. A step is kept only where it lowers the error, so no group is worse than its start.

    weight float32 [rows, in_features]; importance h float64 [in_features], positive.
    """
    scales, offsets = fit_groups(weight, bits, group_size, statistics, smallest_scale)
    for rows in pieces(weight.shape[0], weight.shape[1]):
        w, h = grouped(weight[rows].double(), importance.double(), group_size)
        scale, offset = scales[rows].double(), offsets[rows].double()
        error = _weighted_error(w, h, nearest(w, scale, offset, bits), scale, offset)
        total = h.sum(-1)
        mean_w = (h * w).sum(-1) / total
        for _ in range(ROUNDS):
            q = nearest(w, scale, offset, bits)
            mean_q = (h * q).sum(-1) / total
            centred = q - mean_q[..., None]
            variance = (h * centred * centred).sum(-1)
            slope = (h * centred * w).sum(-1) / variance.clamp(min=1e-300)
            new_scale = round_once(slope.clamp(min=smallest_scale), statistics).double()
            new_scale = torch.where(slope > 0, new_scale, scale)
            new_offset = round_once(mean_w - new_scale * mean_q, statistics).double()
            q = nearest(w, new_scale, new_offset, bits)
            new_error = _weighted_error(w, h, q, new_scale, new_offset)
            better = new_error < error
            if not better.any():
                break
            scale, offset = (
                torch.where(better, new_scale, scale),
                torch.where(better, new_offset, offset),
            )
            error = torch.where(better, new_error, error)
        scales[rows], offsets[rows] = scale.to(statistics), offset.to(statistics)
    return scales, offsets


def refit_affine(
    weight: Tensor,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor,
    hessian: Tensor,
    group_size: int,
    smallest_scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the scales and offsets of least output error for codes that stay as they are.

    With the codes fixed a row w is linear in its statistics t = (scales, offsets), w = S t, so
    (w - S t)ᵀ H (w - S t) has its minimum where Sᵀ H S t = Sᵀ H w: one system of 2 groups unknowns
    a row, over all groups at once. A row that the rounding to storage makes worse stays.

    weight [rows, in_features]; codes uint8 of the same shape; scales, offsets [rows, groups];
    hessian float64 [in_features, in_features], positive definite.
    """
    columns, groups = weight.shape[1], scales.shape[1]
    group = torch.arange(columns, device=weight.device) // group_size
    sums = torch.nn.functional.one_hot(group, groups).to(hessian)  # x @ sums adds up the groups
    by_group = hessian @ sums
    new_scales, new_offsets = scales.clone(), offsets.clone()
    for rows in pieces(weight.shape[0], max(4 * groups * groups, columns)):
        q, w = codes[rows].double(), weight[rows].double()
        scale, offset = scales[rows].double(), offsets[rows].double()
        lost = w - scale[:, group] * q - offset[:, group]
        pull = lost @ hessian
        normal = q.new_empty(len(q), 2 * groups, 2 * groups)
        for index in range(groups):
            inside = slice(index * group_size, min((index + 1) * group_size, columns))
            normal[:, index, :groups] = ((q[:, inside] @ hessian[inside]) * q) @ sums
            normal[:, index, groups:] = q[:, inside] @ by_group[inside]
        normal[:, groups:, :groups] = normal[:, :groups, groups:].transpose(1, 2)
        normal[:, groups:, groups:] = sums.T @ by_group
        diagonal = normal.diagonal(dim1=1, dim2=2)
        diagonal += _RIDGE * diagonal.mean(1, keepdim=True)
        moves = torch.linalg.solve(normal, torch.cat([(pull * q) @ sums, pull @ sums], dim=1))
        scale = round_once((scale + moves[:, :groups]).clamp(min=smallest_scale), scales.dtype)
        offset = round_once(offset + moves[:, groups:], offsets.dtype)
        new_lost = w - scale.double()[:, group] * q - offset.double()[:, group]
        better = ((new_lost @ hessian) * new_lost).sum(1) < (pull * lost).sum(1)
        new_scales[rows] = torch.where(better[:, None], scale, scales[rows])
        new_offsets[rows] = torch.where(better[:, None], offset, offsets[rows])
    return new_scales, new_offsets


def fit_absmax(
    weight: Tensor, importance: Tensor, absmax: Tensor, values: Tensor, block_size: int
) -> Tensor:
    """Return each block's multiplier of small weighted squared error, float32 [blocks].

    Minimises sum_i h_i (w_i - a c_i)² block by block over the flattened weight: from the largest
    magnitude on, the nearest codebook values c and a = sum h c w / sum h c² take turns, and a step
    is kept only where it lowers the error.

    weight [rows, in_features]; importance h float64 [in_features], positive; absmax float32
    [blocks]; values: the codebook, ascending.
    """
    columns, fitted = weight.shape[1], absmax.clone()
    flat, values = weight.reshape(-1), values.double()
    bounds = (values[:-1] + values[1:]) / 2
    for blocks in pieces(absmax.shape[0], block_size):
        index = torch.arange(
            blocks.start * block_size,
            min(blocks.stop * block_size, flat.numel()),
            device=flat.device,
        )
        w, h = grouped(flat[index][None].double(), importance[index % columns], block_size)
        w, h = w[0], h[0]
        scale = absmax[blocks].double()

        def rounded(scale: Tensor, w: Tensor = w) -> Tensor:
            return values[torch.bucketize(w / scale[:, None].clamp(min=1e-38), bounds)]

        c = rounded(scale)
        error = _weighted_error(w, h, c, scale, torch.zeros_like(scale))
        for _ in range(ROUNDS):
            power = (h * c * c).sum(-1)
            new_scale = ((h * c * w).sum(-1) / power.clamp(min=1e-300)).float().double()
            new_scale = torch.where(power > 0, new_scale, scale)
            new_c = rounded(new_scale)
            new_error = _weighted_error(w, h, new_c, new_scale, torch.zeros_like(scale))
            better = new_error < error
            if not better.any():
                break
            scale, error = (
                torch.where(better, new_scale, scale),
                torch.where(better, new_error, error),
            )
            c = torch.where(better[:, None], new_c, c)
        fitted[blocks] = scale.float()
    return fitted


def grouped(weight: Tensor, importance: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return weight and importance as [rows, groups, group_size] and [1, groups, group_size].

    The filler of a short last group repeats the row's last weight and has no importance.
    """
    short = -weight.shape[1] % group_size
    if short:
        weight = torch.cat([weight, weight[:, -1:].expand(-1, short)], dim=1)
        importance = torch.cat([importance, importance.new_zeros(short)])
    shape = (-1, group_size)
    return weight.unflatten(-1, shape), importance.unflatten(0, shape)[None]


def nearest(w: Tensor, scales: Tensor, offsets: Tensor, bits: int) -> Tensor:
    """Return the codes, as floats, of the grid points nearest to w [rows, groups, group_size]."""
    return ((w - offsets[..., None]) / scales[..., None]).round_().clamp_(0, (1 << bits) - 1)


def _weighted_error(w: Tensor, h: Tensor, q: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
    lost = w - scales[..., None] * q - offsets[..., None]
    return (h * lost * lost).sum(-1)


def pieces(rows: int, numbers_per_row: int) -> list[slice]:
    """Return slices that cover `rows`, each of about two million numbers."""
    step = max(1, _PIECE_NUMBERS // numbers_per_row)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
