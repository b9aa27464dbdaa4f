"""GPTQ: rounding a weight column by column, each column making up for the errors before it."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.calibrate.driver import Calibrated
from graft.calibrate.hessian import HessianSum, cholesky, damped_hessian
from graft.errors import GraftError
from graft.formats.base import GridFormat, Packed, WeightFormat

BLOCK_COLUMNS = 128
"""Columns between two updates of the rest."""


class Gptq(Calibrated):
    """GPTQ on the inputs of each layer; see `gptq_pack`."""

    name = "gptq"

    def problem(self, weight_format: WeightFormat | None) -> str | None:
        """Return why it cannot round to a format: one without a grid."""
        if weight_format is None or isinstance(weight_format, GridFormat):
            return super().problem(weight_format)
        return _no_grid(weight_format)

    def pack_on(
        self, weight: Tensor, inputs: HessianSum, weight_format: WeightFormat, damping: float
    ) -> Packed:
        """Return the packed weight whose outputs on these inputs stay near."""
        return gptq_pack(weight, inputs.value, weight_format, damping)


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
    if not isinstance(weight_format, GridFormat):
        raise GraftError(_no_grid(weight_format))
    damped = damped_hessian(hessian.to(weight.device), damping)
    order = damped.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(damped[order][:, order], damping)
    # Kept transposed, so that one column is contiguous in memory.
    rows = weight.double().T[order]
    codes = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    values = torch.empty_like(rows)
    grid = weight_format.fit_grid(weight.float(), damped.diagonal())
    columns = order.tolist()
    for start in range(0, len(columns), BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, len(columns))
        errors = torch.empty_like(rows[start:stop])
        for j in range(start, stop):
            column = columns[j]
            values[column] = rows[j]
            place = column, len(columns)
            codes[column], rounded = weight_format.round_column(rows[j].float(), grid, *place)
            errors[j - start] = (rows[j] - rounded) / factor[j, j]
            rows[j + 1 : stop].addr_(factor[j, j + 1 : stop], errors[j - start], alpha=-1)
        rows[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    chosen = codes.T.contiguous()
    refitted = weight_format.refit_grid(grid, chosen, weight.float(), damped)
    return weight_format.pack_codes(chosen, refitted, values.T)


def _inverse_factor(damped: Tensor, damping: float) -> Tensor:
    """Return U, upper triangular, with Uᵀ U = inverse of the damped Hessian; float64."""
    return cholesky(torch.cholesky_inverse(cholesky(damped, damping)), damping, upper=True)


def _no_grid(weight_format: WeightFormat) -> str:
    return (
        "column-wise solvers need a format with a grid (int, nf4, fp4), which "
        f"{weight_format.name} has not; choose another format, or --solver rtn"
    )


GPTQ = Gptq()
