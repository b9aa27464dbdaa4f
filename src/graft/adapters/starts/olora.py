"""OLoRA: the adapter begins as the first part of its weight's QR decomposition."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.adapters.config import AdapterConfig
from graft.adapters.starts.low_rank import Residual, ResidualStart


class Olora(Residual):
    """W = Q R;  B = the first `rank` columns of Q and A = the first `rank` rows of R.

    arXiv 2406.01775, algorithm 1; W - s B A is frozen. These columns depend on as many columns of W
    alone, and A = Bᵀ W, so no whole decomposition is needed.
    """

    def factors(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        rank = min(self.rank, *weight.shape)
        B = torch.linalg.qr(weight[:, :rank]).Q
        return B.T @ weight, B


class _OloraStart(ResidualStart):
    name = "olora"

    def prepare(self, config: AdapterConfig) -> Olora:
        return Olora(config)


OLORA = _OloraStart()
