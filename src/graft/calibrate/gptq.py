"""GPTQ: rounding a weight column by column, each column making up for the errors before it."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.errors import GraftError
from graft.formats.base import GridFormat, WeightFormat

BLOCK_COLUMNS = 128
"""Columns between two updates of the rest."""


class HessianSum:
    """H = sum over tokens of x xᵀ for the inputs x of one linear layer.

    `value`: float64 [in_features, in_features]; each batch's product is taken in float32.
    `drift`: the sum of (d - x) xᵀ likewise, with d the inputs that the layer had before the layers
    in front of it were rounded; None where none were given.
    `tokens`: how many inputs were added.
    """

    def __init__(self, in_features: int, device: torch.device | str | None = None) -> None:
        self.value = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self.drift: Tensor | None = None
        self.tokens = 0

    def add(self, x: Tensor, unrounded: Tensor | None = None) -> None:
        """Add the inputs x [..., in_features] of any floating dtype, and d of the same shape."""
        inputs = x.detach().reshape(-1, x.shape[-1]).float()
        self.value += inputs.T @ inputs
        self.tokens += inputs.shape[0]
        if unrounded is not None:
            lost = unrounded.detach().reshape(inputs.shape).float() - inputs
            moved = (lost.T @ inputs).double()
            self.drift = moved if self.drift is None else self.drift.add_(moved)


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """Return trace((W - Q) H (W - Q)ᵀ), the squared error of the layer's outputs over all tokens.

    weight, rounded: [out_features, in_features]; computed in float64.
    """
    lost = weight.double() - rounded.double()
    return ((lost @ hessian.to(lost)) * lost).sum().item()


def gptq_pack(
    weight: Tensor, hessian: Tensor, weight_format: WeightFormat, damping: float = 0.01
) -> dict[str, Tensor]:
    """Return the packed weight whose layer outputs stay near those of `weight`.

    Algorithm 1 of GPTQ (arXiv 2210.17323): with U the upper Cholesky factor of the inverse
    Hessian, column j is rounded to q and every later column k moves by -(w_j - q) U[j,k] / U[j,j].
    Columns go by descending diagonal of the Hessian ("act-order"), so that those that matter most
    are rounded while most others can still make up for them. The grids are fitted beforehand, to
    the original weight in the groups of the packed layout ("static groups"), weighted by that
    diagonal, and once more at the end to the codes. Written over the grid interface, so it serves
    any format that has a grid; float64 throughout, but for the rounding itself.

    weight [out_features, in_features]; hessian [in_features, in_features], the sum of x xᵀ. A
    column whose input was always zero is rounded to nearest and moves no other.

    Raises GraftError for a format without a grid, or when the damped Hessian is not positive
    definite.
    """
    grid_format = require_grid(weight_format)
    damped = _damped(hessian.to(weight.device), damping)
    order = damped.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(damped[order][:, order], damping)
    # Kept transposed, so that one column is contiguous in memory.
    rows = weight.double().T[order]
    codes = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    values = torch.empty_like(rows)
    grid = grid_format.fit_grid(weight.float(), damped.diagonal())
    columns = order.tolist()
    for start in range(0, len(columns), BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, len(columns))
        errors = torch.empty_like(rows[start:stop])
        for j in range(start, stop):
            column = columns[j]
            values[column] = rows[j]
            codes[column], rounded = grid_format.round_column(rows[j].float(), grid, column)
            errors[j - start] = (rows[j] - rounded) / factor[j, j]
            rows[j + 1 : stop].addr_(factor[j, j + 1 : stop], errors[j - start], alpha=-1)
        rows[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    chosen = codes.T.contiguous()
    refitted = grid_format.refit_grid(grid, chosen, weight.float(), damped)
    return grid_format.pack_codes(chosen, refitted, values.T)


def made_up(weight: Tensor, inputs: HessianSum, share: float, damping: float) -> Tensor:
    """Return the weight that makes up for a share of the drift of its inputs; float32.

    W + share · W D H⁻¹, with D the drift and H the damped Hessian; with share 1 and no damping the
    least-squares solution of W' x = W d over the tokens, which fits the calibration text too
    closely (QEP, arXiv 2504.09629). weight [out_features, in_features].

    Raises GraftError when the damped Hessian is not positive definite.
    """
    if inputs.drift is None:
        return weight.float()
    damped = _damped(inputs.value.to(weight.device), damping)
    wanted = weight.double() @ inputs.drift.to(damped)
    lower = _cholesky(damped, damping)
    return (weight.double() + share * torch.cholesky_solve(wanted.T, lower).T).float()


def require_grid(weight_format: WeightFormat) -> GridFormat:
    """Return the format when a solver can round to its grid; raises GraftError otherwise."""
    if isinstance(weight_format, GridFormat):
        return weight_format
    raise GraftError(
        "solvers 'gptq' and 'qep' need a format with a grid (int, nf4, fp4), found "
        f"{weight_format.name!r}; choose another format, or --solver rtn"
    )


def _damped(hessian: Tensor, damping: float) -> Tensor:
    """Return the Hessian with damping on its diagonal, float64; dead columns get the mean."""
    damped = hessian.double().clone()
    diagonal = damped.diagonal()
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if not dead.all() else torch.ones_like(diagonal[0])
    diagonal += damping * mean
    # A dead column's row is zero, so any positive entry decouples it from all others.
    diagonal[dead] = mean
    return damped


def _inverse_factor(damped: Tensor, damping: float) -> Tensor:
    """Return U, upper triangular, with Uᵀ U = inverse of the damped Hessian; float64."""
    return _cholesky(torch.cholesky_inverse(_cholesky(damped, damping)), damping, upper=True)


def _cholesky(matrix: Tensor, damping: float, upper: bool = False) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(matrix, upper=upper)
    if failed or not factor.isfinite().all():
        raise GraftError(
            f"the Hessian with damping {damping} is not positive definite or not finite; expected "
            "finite activations: raise --damping (0.01 is usual) or use --solver rtn"
        )
    return factor
