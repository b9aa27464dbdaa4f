"""CorDA: the adapter begins as what of its weight the training text uses most."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.adapters.config import AdapterConfig
from graft.adapters.starts.base import Inputs
from graft.adapters.starts.low_rank import LowRankStart, Residual, ResidualStart
from graft.adapters.svd import leading_svd

_DAMPING = 0.01
"""Of the second moments' mean diagonal, so that they have an inverse; as PEFT's."""


class Corda(Residual):
    """W C = U S Vᵀ;  A = (S/s)^½ Vᵀ C⁻¹ and B = U (S/s)^½ of the `rank` largest singular values.

    arXiv 2406.05223, section 3.3, "instruction-previewed": C are the second moments of the layer's
    inputs on rows of the training data, here with a mean of 1 on the diagonal. W - s B A is frozen.
    """

    def look(self, name: str, weight: Tensor, inputs: Inputs) -> None:
        dense = weight.double()
        moments = inputs.second / inputs.second.diagonal().mean()
        moments.diagonal().add_(_DAMPING)
        left, sizes, right = leading_svd(dense @ moments, self.rank, self.config.svd_steps)
        roots = (sizes / self.scaling).sqrt()
        A = roots[:, None] * torch.linalg.solve(moments, right.T).T
        self.starts[name] = LowRankStart(A.float().contiguous(), (left * roots).float())


class _CordaStart(ResidualStart):
    name = "corda"
    reads_inputs = True

    def prepare(self, config: AdapterConfig) -> Corda:
        return Corda(config)


CORDA = _CordaStart()
