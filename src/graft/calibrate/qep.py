"""QEP: GPTQ on weights that first make up for what rounding the layers before has done."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graft.calibrate.gptq import Gptq
from graft.calibrate.hessian import HessianSum, cholesky, damped_hessian


@dataclass(frozen=True)
class Qep(Gptq):
    """GPTQ of W + share · W D H⁻¹, D being the drift of the layer's inputs; see `made_up`."""

    share: float = 0.5
    """Share of the drift that is made up for, as QEP's authors chose it."""

    name = "qep"
    counts_drift = True

    def wanted(self, weight: Tensor, inputs: HessianSum, damping: float) -> Tensor:
        """Return the weight that makes up for the drift of its inputs."""
        return made_up(weight, inputs, self.share, damping)


def made_up(weight: Tensor, inputs: HessianSum, share: float, damping: float) -> Tensor:
    """Return the weight that makes up for a share of the drift of its inputs; float32.

    W + share · W D H⁻¹, with D the drift and H the damped Hessian; with share 1 and no damping the
    least-squares solution of W' x = W d over the tokens, which fits the calibration text too
    closely (QEP, arXiv 2504.09629). weight [out_features, in_features].

    Raises GraftError when the damped Hessian is not positive definite.
    """
    if inputs.drift is None:
        return weight.float()
    damped = damped_hessian(inputs.value.to(weight.device), damping)
    change = weight.double() @ inputs.drift.to(damped)
    lower = cholesky(damped, damping)
    return (weight.double() + share * torch.cholesky_solve(change.T, lower).T).float()


QEP = Qep()
