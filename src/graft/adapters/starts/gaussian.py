"""Gaussian: A from a normal distribution."""

from __future__ import annotations

import torch
from torch import nn

from graft.adapters.starts.base import Preparation
from graft.adapters.starts.low_rank import DrawnStart, low_rank_adapters


class _Gaussian(DrawnStart):
    """A ~ N(0, 1/rank²), B = 0.

    LoRA (arXiv 2106.09685, section 4.1) draws A from a Gaussian and does not say how wide; 1/rank
    is PEFT's for `init_lora_weights="gaussian"`. It does not shrink with the inputs, as the default
    does.
    """

    name = "gaussian"

    @torch.no_grad()
    def begin(
        self, model: nn.Module, preparation: Preparation | None, name: str = "default"
    ) -> None:
        for *_, A, _ in low_rank_adapters(model, name):
            nn.init.normal_(A, std=1 / len(A))


GAUSSIAN = _Gaussian()
