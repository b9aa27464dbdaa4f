"""The second moments of a layer's inputs, on which calibrated solvers weigh what rounding costs."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.errors import GraftError


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


def damped_hessian(hessian: Tensor, damping: float) -> Tensor:
    """Return the Hessian with damping on its diagonal, float64; dead columns get the mean."""
    damped = hessian.double().clone()
    diagonal = damped.diagonal()
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if not dead.all() else torch.ones_like(diagonal[0])
    diagonal += damping * mean
    # A dead column's row is zero, so any positive entry decouples it from all others.
    diagonal[dead] = mean
    return damped


def cholesky(matrix: Tensor, damping: float, upper: bool = False) -> Tensor:
    """Return the Cholesky factor of a damped Hessian, or of its inverse.

    Raises GraftError when it is not positive definite or not finite.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix, upper=upper)
    if failed or not factor.isfinite().all():
        raise GraftError(
            f"the Hessian with damping {damping} is not positive definite or not finite; expected "
            "finite activations: raise --damping (0.01 is usual) or use --solver rtn"
        )
    return factor
