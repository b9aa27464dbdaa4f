"""Orthogonal: A and B both drawn, in directions that cancel."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from graft.adapters.config import AdapterConfig
from graft.adapters.starts.base import Preparation
from graft.adapters.starts.low_rank import BOTH_FACTORS, DrawnStart, low_rank_adapters

_SIZE = 0.1


class _Orthogonal(DrawnStart):
    """A = 0.1 Q₁ᵀ X and B = 0.1 Y Q₂, with B A = 0, so that both have a gradient at once.

    Q₁ and Q₂ [rank/2, rank] are the even and the odd rows of a random orthogonal matrix; X
    [rank/2, in_features] and Y [out_features, rank/2] are standard normal. As PEFT's
    `init_lora_weights="orthogonal"`.
    """

    name = "orthogonal"
    rate = BOTH_FACTORS

    def problems(self, config: AdapterConfig, **facts: Any) -> list[str]:
        problems = super().problems(config, **facts)
        if config.update_rank % 2:
            problems.append(
                f"--init orthogonal halves the rank, and --rank is {config.update_rank}; give an "
                "even one"
            )
        return problems

    @torch.no_grad()
    def begin(
        self, model: nn.Module, preparation: Preparation | None, name: str = "default"
    ) -> None:
        for _, base, adapter, A, B in low_rank_adapters(model, name):
            rank = len(A)
            turned = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64)).Q
            X = torch.randn(rank // 2, A.shape[1], dtype=torch.float64)
            Y = torch.randn(B.shape[0], rank // 2, dtype=torch.float64)
            A.copy_(_SIZE * turned[0::2].T @ X)
            B.copy_(_SIZE * Y @ turned[1::2])
            adapter.started(base)


ORTHOGONAL = _Orthogonal()
