"""PiSSA: the adapter begins as the principal part of its weight."""

from __future__ import annotations

from torch import Tensor

from graft.adapters.config import AdapterConfig
from graft.adapters.starts.low_rank import Residual, ResidualStart
from graft.adapters.svd import leading_svd


class Pissa(Residual):
    """W = U S Vᵀ;  A = (S/s)^½ Vᵀ and B = U (S/s)^½ of the `rank` largest singular values.

    arXiv 2404.02948, equations 2 to 4, with the update's scaling s. The rest W - s B A is frozen,
    and where the run quantises, it is the rest that is quantised (QPiSSA).
    """

    def factors(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        left, sizes, right = leading_svd(weight, self.rank, self.config.svd_steps)
        roots = (sizes / self.scaling).sqrt()
        return roots[:, None] * right, left * roots


class _PissaStart(ResidualStart):
    name = "pissa"

    def prepare(self, config: AdapterConfig) -> Pissa:
        return Pissa(config)


PISSA = _PissaStart()
